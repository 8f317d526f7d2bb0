"""Under a window a rank is sent the blocks that its queries reach, once, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from distributed import ProcessPool, Worker
from mtraining.layout import build_layout
from mtraining.pattern import build_pattern
from mtraining.ring import Ring, Timeline, sparse_ring_attention
from mtraining.ring.window import needed_blocks

SIZE, TOKENS, BATCH, KV_HEADS, DIM = 8, 256, 2, 2, 16
BLOCK_BYTES = 2 * BATCH * SIZE * KV_HEADS * DIM * 8  # keys and values of a block, in fp64


def sent_job(
    worker: Worker, topology: tuple[int, ...], layout: str, window: int | None
) -> tuple[int, list[int]]:
    """The rank in the ring, and the bytes it sent forward and backward."""
    mesh = worker.ring_mesh(topology)
    q = torch.randn(BATCH, TOKENS // worker.world, 4, DIM, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(BATCH, TOKENS // worker.world, KV_HEADS, DIM, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    with Timeline() as timeline:
        sparse_ring_attention(
            q, k, v, pattern=build_pattern("dense", block_size=SIZE), layout=build_layout(layout, SIZE), mesh=mesh,
            kernel="reference", window=window,
        ).sum().backward()  # fmt: skip
    return Ring.over(mesh).rank, [times.sent for times in timeline.passes]


def pairs_by_token(layout: str, world: int, window: int) -> torch.Tensor:
    """Which blocks of each source hold a key that a query of each rank attends to: bool (rank, source, blocks), token
    by token."""
    positions = build_layout(layout, SIZE).positions(TOKENS, world).tolist()
    found = torch.zeros(world, world, TOKENS // world // SIZE, dtype=torch.bool)
    for rank in range(world):
        for source in range(world):
            for place, key in enumerate(positions[source]):
                if any(key <= query < key + window for query in positions[rank]):
                    found[rank, source, place // SIZE] = True
    return found


@pytest.mark.parametrize("window", [1, 2, 9, 10, 64, 65, 200])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("world", [2, 4])
def test_needed_blocks(layout: str, world: int, window: int) -> None:
    blocks = build_layout(layout, SIZE).blocks(TOKENS, world, SIZE)
    assert torch.equal(needed_blocks(blocks, SIZE, window), pairs_by_token(layout, world, window))


SENDS: list[tuple[Any, ...]] = [
    ((2,), "contiguous", 9), ((2,), "zigzag", 20), ((2, 2), "contiguous", 40), ((2, 2), "zigzag", 9),
    ((2,), "striped", 200),
    pytest.param((4,), "zigzag", 30, marks=pytest.mark.slow),
    pytest.param((4,), "contiguous", 100, marks=pytest.mark.slow),
    pytest.param((2, 4), "contiguous", 20, marks=pytest.mark.slow),
    pytest.param((4,), "striped", 9, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("topology", "layout", "window"), SENDS)
def test_no_key_is_sent_that_nobody_needs(
    pool: ProcessPool, topology: tuple[int, ...], layout: str, window: int
) -> None:
    """Forward, the needed blocks of each rank once; backward those again, and the gradients of what it received."""
    world = math.prod(topology)
    needed = pairs_by_token(layout, world, window) & ~torch.eye(world, dtype=torch.bool)[..., None]
    for rank, (forward, backward) in pool.run(
        sent_job, world=world, topology=topology, layout=layout, window=window
    ):
        assert forward == int(needed[:, rank].sum()) * BLOCK_BYTES
        assert backward == forward + int(needed[rank].sum()) * BLOCK_BYTES


@pytest.mark.parametrize("window", [None, TOKENS])
def test_keys_go_round_where_all_are_needed(pool: ProcessPool, window: int | None) -> None:
    """Striped, every rank needs keys of the other: each payload travels one hop, as without a window."""
    for _, (forward, _) in pool.run(sent_job, world=2, topology=(2,), layout="striped", window=window):
        assert forward == TOKENS // 2 // SIZE * BLOCK_BYTES
