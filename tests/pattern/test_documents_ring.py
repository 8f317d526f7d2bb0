"""Packed documents over ranks: every rank finds what one process finds; recall, density and balance are the mask's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distributed import ProcessPool, Worker
from document_cases import NAMES, PACKED, TOKENS, pattern_of
from mtraining.evaluate.recall import attention_rows, index_recall
from mtraining.kernel import SparseIndex
from mtraining.layout import Layout, build_layout
from mtraining.pattern import SequenceShard
from mtraining.ring import Observer, Ring, imbalance, sparse_ring_attention, tile_work
from mtraining.ring.observe import AttentionStats
from pattern_cases import SIZE
from starts_cases import allowed, of_window

SCALE = 0.25


def tensors() -> list[Tensor]:
    made = torch.Generator().manual_seed(3)
    return [2 * torch.randn(2, TOKENS, heads, 16, generator=made, dtype=torch.float64) for heads in (4, 2, 2)]


def observed(
    worker: Worker | None, name: str, layout: str, starts: Tensor, window: int | None = None
) -> AttentionStats:
    """One attention call, recall over all rows that a generator draws; the index whole."""
    mesh = None
    if worker is not None:
        mesh = worker.mesh() if worker.world < 4 else worker.mesh((2, 2), ("cp_outer", "cp_inner"))
    dealt = build_layout(layout, SIZE)
    ring = Ring.over(mesh)
    q, k, v = (dealt.shard(x, ring.rank, ring.world) for x in tensors())
    with Observer(recall_rows=200) as observer:
        sparse_ring_attention(
            q,
            k,
            v,
            pattern=pattern_of(name),
            layout=dealt,
            mesh=mesh,
            scale=SCALE,
            starts=starts,
            window=window,
        )
    return observer.stats[0]


def observed_job(
    worker: Worker, layout: str, packed: str
) -> dict[str, tuple[SparseIndex, float | None, float]]:
    found = {name: observed(worker, name, layout, PACKED[packed]) for name in NAMES}
    return {name: (stats.index, stats.recall, stats.density) for name, stats in found.items()}


@pytest.mark.parametrize("packed", ["at blocks", pytest.param("anywhere", marks=pytest.mark.slow)])
@pytest.mark.parametrize("topology", [(2,), pytest.param((2, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_ranks_find_what_one_process_finds(
    pool: ProcessPool, layout: str, topology: tuple[int, ...], packed: str
) -> None:
    alone = {name: observed(None, name, "contiguous", PACKED[packed]) for name in NAMES}
    for found in pool.run(observed_job, world=math.prod(topology), layout=layout, packed=packed):
        for name, (index, recall, density) in found.items():
            assert torch.equal(index.to_mask(), alone[name].index.to_mask()), name
            assert recall == pytest.approx(alone[name].recall, rel=1e-9), name
            assert density == pytest.approx(alone[name].density, rel=1e-9), name


def softmax_of(mask: Tensor) -> Tensor:
    """The true softmax over what ``mask`` leaves: (batch, heads, queries, keys)."""
    q, k, _ = tensors()
    scores = q.transpose(1, 2) @ k.repeat_interleave(2, 2).transpose(1, 2).transpose(-1, -2) * SCALE
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


@pytest.mark.parametrize("packed", [*PACKED, "window"])
@pytest.mark.parametrize("name", NAMES)
def test_recall_density_and_balance_are_of_the_masked_attention(name: str, packed: str) -> None:
    window = 21 if packed == "window" else None
    starts = of_window(TOKENS, 21, 2) if window else PACKED[packed]
    stats = observed(None, name, "contiguous", None if window else starts, window)
    mask, leaves = stats.index.to_mask(), allowed(starts)
    assert torch.equal(mask, mask & leaves)
    rows = torch.randint(TOKENS, (200,), generator=torch.Generator().manual_seed(0))
    kept = (softmax_of(leaves) * mask).sum(-1)[:, :, rows]
    assert stats.recall == pytest.approx(kept.mean().item(), rel=1e-9)
    for head in range(4):
        attention = attention_rows(*tensors()[:2], rows, head, SCALE, starts[0])[None].expand(4, -1, -1)
        mine = index_recall(stats.index, attention, rows)[head]
        torch.testing.assert_close(mine.double(), kept[0, head], rtol=1e-4, atol=1e-5)

    # Tiles: those that some entry of the mask's tile part makes. An entry of a column outside of them costs a block.
    tiles = torch.stack([tiles for *_, tiles in stats.index.tiles_by_head()]).view(2, 4, 16, 16)
    there = leaves.expand(-1, 4, -1, -1).unflatten(3, (-1, SIZE)).unflatten(2, (-1, SIZE)).any(-1).any(3)
    assert torch.equal(tiles, tiles & there)
    blocks, alone = 0, torch.zeros(2, 4)
    for b in range(2):
        for h in range(4):
            for column in set(stats.index.columns[b, h].tolist()) - {TOKENS}:
                reads = leaves[b, 0, :, column].unflatten(0, (-1, SIZE)).any(-1)
                blocks += int(reads.sum())
                alone[b, h] += (reads & ~tiles[b, h, :, column // SIZE]).sum()
    area = tiles.sum().item() * SIZE**2 + blocks * SIZE
    assert stats.index.computed_area().sum().item() == pytest.approx(area)
    selected = tiles.sum((2, 3)) * SIZE**2 + alone * SIZE
    density = selected / (there[:, 0].sum((1, 2)) * SIZE**2)[:, None]
    torch.testing.assert_close(stats.index.density(), density.double(), rtol=1e-6, atol=0)
    assert stats.density == pytest.approx(density.mean().item(), rel=1e-6)

    for layout in ("contiguous", "zigzag", "striped"):
        dealt: Layout = build_layout(layout, SIZE)
        numbers = dealt.blocks(TOKENS, 4, SIZE)
        counted = torch.tensor(
            [[int(tiles[:, :, mine][..., theirs].sum()) for theirs in numbers] for mine in numbers]
        )
        work = tile_work(stats.index, dealt, 4)
        assert torch.equal(work, counted.double())
        assert imbalance(work).worker >= 1


def test_the_shard_of_a_batch_is_kept_for_the_next_layer() -> None:
    base, starts = SequenceShard.whole(TOKENS), PACKED["anywhere"].clone()
    first = base.of_batch(starts=starts)
    assert base.of_batch(starts=starts) is first and base.of_batch() is base
    assert base.of_batch(starts=starts.clone()) is not first
    second = base.of_batch(starts=starts)
    starts.zero_()  # another batch in the same memory
    assert base.of_batch(starts=starts) is not second
    assert base.of_batch(starts=starts).documents.past.eq(TOKENS).all()  # type: ignore[union-attr]
