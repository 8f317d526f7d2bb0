"""What a ring needs to know of a layout before it turns: small tables, made once per shape and kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from mtraining.kernel import Backend, Placement
from mtraining.kernel.placement import causal_pieces, progression
from mtraining.layout import Layout
from mtraining.pattern import SequenceShard
from mtraining.ring.topology import Ring


@dataclass(frozen=True, eq=False)
class RingPlan:
    """Where every rank's blocks stand.

    Attributes:
        ring: the ranks.
        all_positions: int64 (world, local tokens), global positions of each rank's tokens.
        placements: for each source rank, this rank's queries against that source's keys.
    """

    ring: Ring
    layout: Layout
    block_size: int
    all_positions: Tensor
    placements: tuple[Placement, ...]

    @property
    def seq_len(self) -> int:
        return self.all_positions.numel()

    def shard(self, backend: Backend, padding: int = 0) -> SequenceShard:
        """This rank's part of the sequence, as patterns see it; its last ``padding`` tokens are padding."""
        if backend not in self._shards:
            self._shards[backend] = SequenceShard(self.all_positions, self.ring, backend)
        return self._shards[backend].padded(padding)

    @cached_property
    def _shards(self) -> dict[Backend, SequenceShard]:
        """Kept with the plan, so that the tables of a length go when its plan does."""
        return {}

    @property
    def q_blocks(self) -> Tensor:
        """int64 (local blocks,): global numbers of this rank's blocks."""
        return self.placements[0].q_blocks


@lru_cache(maxsize=64)
def make_plan(ring: Ring, layout: Layout, seq_len: int, block_size: int, device: torch.device) -> RingPlan:
    """The plan of a sequence of ``seq_len`` tokens over the ring.

    Raises:
        UserError: the layout cannot deal this length in whole blocks.
    """
    layout.check(seq_len, ring.world, block_size)
    blocks = layout.blocks(seq_len, ring.world, block_size)
    on_device = blocks.to(device).unbind(0)
    mine = blocks[ring.rank]
    placements = tuple(
        Placement(
            on_device[ring.rank],
            keys,
            seq_len // block_size,
            progression(mine, theirs),
            causal_pieces(mine, theirs),
        )
        for keys, theirs in zip(on_device, blocks, strict=True)
    )
    positions = layout.positions(seq_len, ring.world).to(device)
    return RingPlan(ring, layout, block_size, positions, placements)
