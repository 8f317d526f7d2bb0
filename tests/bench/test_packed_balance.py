"""The balance benchmark of packed mixes: its sequences are full, and it measures what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from mtraining.layout import build_layout
from mtraining.pattern import SequenceShard
from mtraining.ring import imbalance, tile_work
from starts_cases import of_documents


@pytest.fixture
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("packed_balance")


def test_mixes_fill_the_sequence_with_ever_shorter_documents(bench: ModuleType) -> None:
    mixes = bench.mixes(8192)
    assert all(sum(lengths) == 8192 and min(lengths) > 0 for lengths in mixes.values())
    counts = [len(lengths) for lengths in mixes.values()]
    assert counts == sorted(counts) and counts[0] == 1
    assert mixes == bench.mixes(8192), "the same on every machine"


def test_stripes_stay_even_for_vertical_slash_of_long_documents(bench: ModuleType) -> None:
    """What the page says of books, on made-up queries and keys: each document's diagonals are dealt evenly."""
    lengths = bench.mixes(2048)["books"]
    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2048, heads, 16, generator=made) for heads in (2, 1))
    starts = of_documents(lengths)
    shard = SequenceShard.whole(2048).of_batch(starts=starts)
    index = replace(bench.patterns(8)["vertical_slash"].estimate(q, k, shard, 0.25), starts=starts)
    degree = {
        name: imbalance(tile_work(index, build_layout(name, 8), 8)).worker
        for name in ("striped", "zigzag", "contiguous")
    }
    assert degree["striped"] < 1.1 < min(degree["zigzag"], degree["contiguous"])
