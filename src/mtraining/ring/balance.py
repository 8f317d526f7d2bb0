"""How evenly a layout spreads the work of an index over ranks and over ring steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex
from mtraining.layout import Layout
from mtraining.ring.topology import ring_offset


@dataclass(frozen=True)
class Imbalance:
    """Imbalance degrees, max / mean of slash tiles; 1.0 is perfect.

    Attributes:
        worker: over ranks within a step; of a whole pass, the sum of each step's slowest rank over the sum of means.
        worker_by_step: the same for each ring step.
        step: over steps, of the mean rank.
    """

    worker: float
    worker_by_step: list[float]
    step: float


@lru_cache(maxsize=16)
def _diagonal_counts(layout: Layout, seq_len: int, block_size: int, world: int) -> Tensor:
    """Blocks of each diagonal with queries on one rank, keys on the other: float64 (ranks, sources, num_blocks)."""
    blocks = layout.blocks(seq_len, world, block_size)
    num_blocks = seq_len // block_size
    counts = torch.zeros(world, world, num_blocks, dtype=torch.float64)
    for rank in range(world):
        for source in range(world):
            distance = (blocks[rank][:, None] - blocks[source][None, :]).flatten()
            counts[rank, source] = torch.bincount(distance[distance >= 0], minlength=num_blocks)
    return counts


def tile_work(index: SparseIndex, layout: Layout, world: int) -> Tensor:
    """Slash tiles computed by each rank for each source's keys, summed over batch and heads; none that starts hide.

    Any layout and world may be asked about, not only those in use.

    Returns:
        float64 (world ranks, world sources), on the CPU.

    Raises:
        ValueError: the index holds one rank's block rows only; make it whole first.
    """
    return tile_works([index], [(layout, world)])[0][0]


def tile_works(indices: Sequence[SparseIndex], rings: Sequence[tuple[Layout, int]]) -> list[Tensor]:
    """:func:`tile_work` of many indices of one length under many (layout, world): for each ring, float64 (indices,
    ranks, sources), on the CPU.

    Slashes are counted by distance, all indices in one product. Block lists and starts need a look at every tile, once
    for all rings.
    """
    works = [torch.empty(len(indices), world, world, dtype=torch.float64) for _, world in rings]
    by_distance: dict[tuple[int, int], list[int]] = {}
    for place, index in enumerate(indices):
        if index.blocks is None and index.starts is None:
            by_distance.setdefault((index.seq_len, index.block_size), []).append(place)
            continue
        tiles = _tiles(index)
        for work, (layout, world) in zip(works, rings, strict=True):
            holds = torch.zeros(world, index.num_blocks, dtype=torch.float64)
            holds = holds.scatter_(1, layout.blocks(index.seq_len, world, index.block_size), 1.0)
            work[place] = (holds.to(tiles.device) @ tiles @ holds.to(tiles.device).T).cpu()
    for (seq_len, block_size), places in by_distance.items():
        sums = [indices[place].diagonals.sum((0, 1), dtype=torch.float64) for place in places]
        slashes = torch.stack(sums).cpu()
        for work, (layout, world) in zip(works, rings, strict=True):
            counts = _diagonal_counts(layout, seq_len, block_size, world)
            work[places] = (counts @ slashes.T).permute(2, 0, 1)
    return works


def _tiles(index: SparseIndex) -> Tensor:
    """How many heads of all sequences select each tile: float64 (num_blocks, num_blocks)."""
    device = index.diagonals.device
    heads = torch.zeros(index.num_blocks, index.num_blocks, dtype=torch.float64, device=device)
    for _, _, tiles in index.tiles_by_head():
        heads += tiles
    return heads


def by_step(work: Tensor, outer: int = 1) -> Tensor:
    """(ranks, sources) -> (ranks, ring steps), in the order a ring of ``outer`` x inner meets the sources."""
    world = work.shape[0]
    inner = world // outer
    offsets = torch.tensor([ring_offset(a, b, outer) for a in range(outer) for b in range(inner)])
    return work.gather(1, (torch.arange(world)[:, None] - offsets) % world)


def imbalance(work: Tensor, outer: int = 1) -> Imbalance:
    """Imbalance degrees of ``work`` (ranks, sources) from :func:`tile_work`, on a ring of ``outer`` x inner ranks."""
    steps = by_step(work, outer)
    slowest, mean = steps.amax(0), steps.mean(0)
    safe = mean.clamp(min=torch.finfo(mean.dtype).tiny)
    degrees = torch.where(mean > 0, slowest / safe, 1.0)
    total = mean.sum().item()
    if total == 0:
        return Imbalance(1.0, degrees.tolist(), 1.0)
    return Imbalance(slowest.sum().item() / total, degrees.tolist(), mean.max().item() * mean.numel() / total)
