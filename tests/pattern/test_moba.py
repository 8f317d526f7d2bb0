"""MoBA against the paper's definition, query by query."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtraining.errors import UserError
from mtraining.pattern import SequenceShard, build_pattern


def paper_chunks(gates: list[float], own: int, top_k: int) -> set[int]:
    """Chunks of one query, from its gates of the chunks up to its own: its own first, then the best of the past."""
    past = sorted(range(own), key=lambda i: -gates[i])
    return {own, *past[: top_k - 1]}


def brute_force_mask(q: Tensor, k: Tensor, block_size: int, chunk: int, top_k: int) -> Tensor:
    """(heads, n, n) of one sequence; a block of queries decides by the mean of its queries' gates."""
    n, heads, _ = q.shape
    mask = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        keys = k[:, h * k.shape[1] // heads]
        means = [keys[start : start + chunk].mean(0) for start in range(0, n, chunk)]
        for first in range(0, n, block_size):
            rows = range(first, first + block_size)
            gates = [sum(float(q[i, h] @ mean) for i in rows) / block_size for mean in means]
            chosen = paper_chunks(gates, first // chunk, top_k)
            for i in rows:
                for j in range(i + 1):
                    mask[h, i, j] = j // chunk in chosen
    return mask


@settings(max_examples=25)
@given(st.integers(0, 2**20), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 6))
def test_equals_brute_force(seed: int, block_size: int, blocks: int, top_k: int) -> None:
    """Block size 1 is the paper's own definition; with chunks of three blocks the last one is short."""
    torch.manual_seed(seed)
    q, k = torch.randn(1, 32, 4, 8, dtype=torch.float64), torch.randn(1, 32, 2, 8, dtype=torch.float64)
    pattern = build_pattern("moba", block_size=block_size, chunk=blocks * block_size, top_k=top_k)
    index = pattern.estimate(q, k, SequenceShard.whole(32), 0.25)
    assert torch.equal(
        index.to_mask()[0], brute_force_mask(q[0], k[0], block_size, blocks * block_size, top_k)
    )


def test_low_precision_gates_are_summed_in_fp32() -> None:
    q, k = torch.randn(1, 64, 2, 8).bfloat16(), torch.randn(1, 64, 2, 8).bfloat16()
    pattern = build_pattern("moba", block_size=4, chunk=8, top_k=3)
    low = pattern.estimate(q, k, SequenceShard.whole(64), 1.0)
    assert torch.equal(
        low.to_mask(), pattern.estimate(q.float(), k.float(), SequenceShard.whole(64), 1.0).to_mask()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chunk": 100}, "pattern.chunk: 100 .* multiple of pattern.block_size=128"),
        ({"top_k": 0}, "pattern.top_k: 0"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_pattern("moba", **options)
