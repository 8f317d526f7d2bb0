"""XAttention against the paper's definition, score by score."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtraining.errors import UserError
from mtraining.pattern import SequenceShard, build_pattern
from mtraining.pattern import xattention as module


def brute_force_blocks(
    q: Tensor, k: Tensor, size: int, stride: int, threshold: float, scale: float
) -> Tensor:
    """(heads, blocks, blocks) of one sequence, from the full score matrix."""
    n, heads, _ = q.shape
    blocks, squares, per = n // size, n // stride, size // stride
    chosen = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    for h in range(heads):
        scores = q[:, h] @ k[:, h * k.shape[1] // heads].T * scale
        mass = [[0.0] * blocks for _ in range(blocks)]
        for i in range(squares):
            sums = [
                sum(float(scores[i * stride + stride - 1 - s, j * stride + s]) for s in range(stride))
                / stride
                for j in range(i + 1)
            ]
            total = sum(math.exp(x) for x in sums)
            for j, x in enumerate(sums):
                mass[i // per][j // per] += math.exp(x) / total
        for row in range(blocks):
            order = sorted({0, row}) + sorted(set(range(1, row)), key=lambda j: -mass[row][j])
            kept = 0.0
            for place, block in enumerate(order):
                if place >= len({0, row}) and kept >= threshold * sum(mass[row]):
                    break
                chosen[h, row, block] = True
                kept += mass[row][block]
    return chosen


@settings(max_examples=20)
@given(
    st.integers(0, 2**20),
    st.sampled_from([(4, 4), (8, 2), (8, 8), (4, 1)]),
    st.sampled_from([0.3, 0.7, 0.95]),
)
def test_equals_brute_force(seed: int, sizes: tuple[int, int], threshold: float) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(1, 48, 4, 8, dtype=torch.float64) * 2, torch.randn(1, 48, 2, 8, dtype=torch.float64)
    pattern = build_pattern("xattention", block_size=sizes[0], stride=sizes[1], threshold=threshold)
    tiles = [t for *_, t in pattern.estimate(q, k, SequenceShard.whole(48), 0.35).tiles_by_head()]
    assert torch.equal(torch.stack(tiles), brute_force_blocks(q[0], k[0], *sizes, threshold, 0.35))


def test_keys_may_come_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(2, 64, 4, 8, dtype=torch.float64), torch.randn(2, 64, 2, 8, dtype=torch.float64)
    at_once = module.antidiagonal_mass(q, k, SequenceShard.whole(64), 0.35, 8, 4)
    monkeypatch.setattr(module, "_KEY_BLOCKS", 3)
    in_pieces = module.antidiagonal_mass(q, k, SequenceShard.whole(64), 0.35, 8, 4)
    torch.testing.assert_close(in_pieces, at_once, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(at_once.sum(-1), torch.full((2, 4, 8), 2.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": 48}, "pattern.stride: 48 .* divisor of pattern.block_size=128"),
        ({"stride": 0}, "pattern.stride: 0"),
        ({"threshold": 0.0}, "pattern.threshold: 0.0"),
        ({"threshold": 1.1}, "pattern.threshold: 1.1"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_pattern("xattention", **options)
