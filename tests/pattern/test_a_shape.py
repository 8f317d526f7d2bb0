"""Sinks and window, entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtraining.errors import UserError
from mtraining.pattern import SequenceShard, build_pattern


@given(st.integers(1, 9), st.integers(0, 80), st.integers(1, 80))
def test_equals_brute_force(block_size: int, sinks: int, window: int) -> None:
    n = 8 * block_size
    q = torch.randn(2, n, 3, 4)
    pattern = build_pattern("a_shape", block_size=block_size, sinks=sinks, window=window)
    mask = pattern.estimate(q, q[:, :, :1], SequenceShard.whole(n), 0.5).to_mask()
    # a block is computed if any query and key of two such blocks can stand within the window
    near = {(d + r) // block_size for d in range(min(window, n)) for r in range(block_size)}
    for i in range(n):
        for j in range(n):
            wanted = j <= i and (j < sinks or i // block_size - j // block_size in near)
            assert bool(mask[1, 2, i, j]) == wanted
    assert torch.equal(mask, mask[1, 2].expand_as(mask))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sinks": -1}, "pattern.sinks: -1"),
        ({"window": 0}, "pattern.window: 0"),
        ({"windows": 3}, "did you mean 'window'"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_pattern("a_shape", **options)
