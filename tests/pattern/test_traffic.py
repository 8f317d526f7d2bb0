"""Bytes that each estimate moves between ranks, counted at the collectives: what docs/patterns/ says they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from mtraining.layout import build_layout
from mtraining.pattern import PATTERNS, SequenceShard, build_pattern

TOKENS, SIZE, HEADS, KV, DIM, PROBE, COLUMNS = 2048, 32, 6, 2, 16, 24, 64
BLOCKS = TOKENS // SIZE


@dataclass
class Counted:
    """The first of ``world`` ranks, whose neighbours all hold what it holds; ``received`` counts bytes."""

    world: int
    rank: int = 0
    received: list[int] = field(default_factory=list)

    def _count(self, x: Tensor) -> Tensor:
        self.received.append(x.numel() * x.element_size())
        return x

    def all_sum(self, x: Tensor) -> Tensor:
        return self._count(x.clone())

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._count(x.clone())

    def all_gather(self, x: Tensor) -> Tensor:
        return self._count(x.expand(self.world, *x.shape).contiguous())


def padded(world: int) -> int:
    """Query heads, dealt to ranks in equal numbers."""
    return -(-HEADS // world) * world


def probed(world: int, queries: int, slash: int = 1) -> int:
    """Queries, their log-sum-exps, mass by column and slash (distance, or block), and what was chosen."""
    masses = 4 * padded(world) * (TOKENS // world + TOKENS // slash)
    return (
        2 * queries * HEADS * DIM
        + 4 * world * HEADS * queries
        + masses
        + padded(world) * (4 * COLUMNS + BLOCKS)
    )


EXPECTED: dict[str, tuple[dict[str, Any], Any]] = {
    "dense": ({}, lambda world: 0),
    "a_shape": ({}, lambda world: 0),
    "toeplitz_random": ({"density": 0.3, "columns": 9}, lambda world: 0),
    "vertical_slash": ({"probe": PROBE, "max_columns": COLUMNS}, lambda world: probed(world, PROBE)),
    "moba": ({"chunk": 128, "top_k": 2}, lambda world: 4 * KV * DIM * TOKENS // 128),
    "xattention": ({}, lambda world: 2 * KV * DIM * TOKENS),
    "flexprefill": (
        {"max_columns": COLUMNS},
        lambda world: 4 * KV * DIM * BLOCKS + probed(world, SIZE) + 15 * 24 * HEADS
        # the last block's true attention by key block; each rank estimates it from the probe that it has
        + 4 * BLOCKS * padded(world),
    ),
    "union": (
        {"patterns": ["xattention", {"name": "moba", "options": {"chunk": 128}}]},
        lambda world: 2 * KV * DIM * TOKENS + 4 * KV * DIM * TOKENS // 128,
    ),
}  # fmt: skip


def test_every_pattern_is_counted() -> None:
    assert set(EXPECTED) == set(PATTERNS)


def received(world: int, name: str, **options: Any) -> int:
    comm = Counted(world)
    shard = SequenceShard(build_layout("striped", SIZE).positions(TOKENS, world), comm)
    q, k = (torch.randn(1, TOKENS // world, heads, DIM, dtype=torch.bfloat16) for heads in (HEADS, KV))
    build_pattern(name, block_size=SIZE, **options).estimate(q, k, shard, 0.25)
    if name == "vertical_slash":
        assert (
            len(comm.received) == 4
        )  # queries, their log-sum-exps, masses, the choice: each a message's latency
    return sum(comm.received)


@pytest.mark.parametrize("world", [4, 16])
@pytest.mark.parametrize("name", EXPECTED)
def test_bytes_of_an_estimate(name: str, world: int) -> None:
    options, expected = EXPECTED[name]
    assert received(world, name, **options) == expected(world)


@pytest.mark.parametrize("world", [4, 16])
def test_slashes_by_block_travel_by_block(world: int) -> None:
    options = EXPECTED["vertical_slash"][0]
    assert received(world, "vertical_slash", slash_by="block", **options) == probed(world, PROBE, SIZE)


@pytest.mark.parametrize("world", [4, 16])
def test_two_levels_of_means_need_mean_keys_alone(world: int) -> None:
    means = 4 * KV * DIM * BLOCKS
    assert received(world, "xattention", refine=3) == means
    whole = {"max_columns": COLUMNS}
    assert received(world, "flexprefill", **whole, refine=3) == received(world, "flexprefill", **whole)
