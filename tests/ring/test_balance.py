"""Worker and step balance: striped is even by construction, whatever the slashes; zigzag is reported beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtraining.kernel import SparseIndex, dense_index, pack_blocks
from mtraining.layout import Layout, build_layout
from mtraining.ring import imbalance, tile_work, tile_works
from mtraining.ring.balance import by_step

BLOCK = 16


def slash_index(num_blocks: int, diagonals: list[list[int]]) -> SparseIndex:
    bits = torch.zeros(1, len(diagonals), num_blocks, dtype=torch.bool)
    for head, picked in enumerate(diagonals):
        bits[0, head, picked] = True
    none = torch.full((1, len(diagonals), 1), num_blocks * BLOCK, dtype=torch.int32)
    return SparseIndex(num_blocks * BLOCK, BLOCK, bits, none)


def counted_work(index: SparseIndex, layout: Layout, world: int) -> torch.Tensor:
    """Tiles per (rank, source) by looking at every block."""
    blocks = layout.positions(index.seq_len, world)[:, ::BLOCK] // BLOCK
    return torch.stack(
        [torch.stack([index.tile_mask(mine, theirs).sum() for theirs in blocks]) for mine in blocks]
    ).double()


@given(st.sampled_from(["contiguous", "zigzag", "striped"]), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_work_is_counted_tile_by_tile(name: str, world: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    picked = [torch.randperm(32, generator=generator)[:5].tolist() for _ in range(3)]
    index, layout = slash_index(32, picked), build_layout(name, 2 * BLOCK if world < 4 else BLOCK)
    assert torch.equal(tile_work(index, layout, world), counted_work(index, layout, world))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([(2, 1), (4, 1), (8, 1), (8, 2), (8, 4)]))
def test_striped_is_even_over_ranks_in_each_step(
    seed: int, clustered: bool, topology: tuple[int, int]
) -> None:
    """Random and clustered slashes, 512 blocks: at most 1.1 in every step that has work worth the name."""
    world, outer = topology
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for _ in range(4):
        if clustered:
            start = int(torch.randint(0, 384, (1,), generator=generator))
            heads.append([0, 1, *range(start, start + 24)])
        else:
            heads.append([0, 1, *torch.randperm(448, generator=generator)[:24].tolist()])
    index = slash_index(512, heads)
    striped = imbalance(tile_work(index, build_layout("striped", BLOCK), world), outer)
    zigzag = imbalance(tile_work(index, build_layout("zigzag"), world), outer)
    assert max(striped.worker_by_step) <= 1.1
    assert striped.worker <= 1.05
    assert striped.worker <= zigzag.worker + 0.01


def test_zigzag_balances_dense_work_and_contiguous_does_not() -> None:
    index = dense_index(1, 1, 64 * BLOCK, BLOCK, torch.device("cpu"))
    degree = {
        name: imbalance(tile_work(index, build_layout(name, BLOCK), 4)).worker
        for name in ("zigzag", "contiguous")
    }
    assert degree["zigzag"] < 1.1 < 1.5 < degree["contiguous"]


def test_zigzag_does_not_balance_slashes() -> None:
    """Far slashes: only late queries have keys so far away, and zigzag gives them to few ranks in a step."""
    index = slash_index(256, [[0, 1, 120, 121, 122, 123]])
    assert imbalance(tile_work(index, build_layout("zigzag"), 8)).worker > 2
    assert imbalance(tile_work(index, build_layout("striped", BLOCK), 8)).worker < 1.1


def test_steps_follow_the_ring() -> None:
    work = torch.arange(16.0).view(4, 4)
    assert by_step(work)[1].tolist() == [5, 4, 7, 6]  # rank 1 meets sources 1, 0, 3, 2
    # two nodes of two: ranks 0 and 2 share a node; rank 1's inner ring brings 3, the outer hop 0, then 2
    assert by_step(work, outer=2)[1].tolist() == [5, 7, 4, 6]


def test_no_work_is_no_imbalance() -> None:
    degree = imbalance(torch.zeros(4, 4))
    assert (degree.worker, degree.step) == (1.0, 1.0)
    assert degree.worker_by_step == pytest.approx([1.0] * 4)


def test_many_indices_are_counted_together() -> None:
    """Slashes, starts and block lists, of two lengths of blocks, each as if it were asked about alone."""
    made = torch.Generator().manual_seed(3)
    columns = torch.empty(1, 2, 0, dtype=torch.int32)

    def index(size: int, **more: torch.Tensor) -> SparseIndex:
        return SparseIndex(128, size, torch.rand(1, 2, 128 // size, generator=made) < 0.4, columns, **more)

    starts = torch.zeros(1, 128, dtype=torch.int32)
    starts[:, 50:] = 50
    lists = pack_blocks(torch.rand(1, 2, 16, 16, generator=made) < 0.3)
    indices = [index(8), index(16), index(8, starts=starts), index(8, blocks=lists), index(8)]
    rings = [(build_layout("striped", 16), 4), (build_layout("zigzag"), 2)]
    for works, (layout, world) in zip(tile_works(indices, rings), rings, strict=True):
        for work, one in zip(works, indices, strict=True):
            assert torch.equal(work, tile_work(one, layout, world))
        assert not torch.equal(works[0], works[-1])
