"""What a ring needs to know of a layout before it turns: small tables, made once per shape and kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel import EstimationKernels, Placement, Window, reach_of
from mtraining.kernel.placement import causal_pieces, progression
from mtraining.kernel.starts import check_starts, window_starts, within_documents
from mtraining.layout import Layout
from mtraining.pattern import SequenceShard
from mtraining.ring.topology import Ring
from mtraining.ring.window import WindowRoute, make_route


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

    def shard(
        self, backend: EstimationKernels, padding: int = 0, starts: Tensor | None = None, packed: bool = True
    ) -> SequenceShard:
        """This rank's part of the sequence, as patterns see it; its last ``padding`` tokens are padding."""
        if backend not in self._shards:
            self._shards[backend] = SequenceShard(self.all_positions, self.ring, backend)
        return self._shards[backend].of_batch(padding, starts, packed)

    @cached_property
    def _shards(self) -> dict[EstimationKernels, SequenceShard]:
        """Kept with the plan, so that the tables of a length go when its plan does."""
        return {}

    def starts(self, batch: int, starts: Tensor | None, window: Window | None) -> Tensor | None:
        """The starts that hold in a call, from those of its batch and from its layer's window; None for neither.

        Layers of one window are given the same tensor, since kernels keep tables with it.

        Raises:
            UserError: starts of another shape, or a window without a token.
        """
        if starts is not None:
            check_starts(starts, batch, self.seq_len, self.all_positions.device)
        if window is None:
            return starts
        if reach_of(window) < 1:
            raise UserError(f"window: {window} holds no token; give at least 1, or None for no window.")
        if starts is not None:
            return within_documents(starts, window)
        if (batch, window) not in self._windows:
            alone = window_starts(self.seq_len, window, self.all_positions.device)
            self._windows[batch, window] = alone.repeat(batch, 1)
        return self._windows[batch, window]

    def route(self, window: Window | None) -> WindowRoute | None:
        """How keys travel under a window; None where they go round the ring, as without one.

        Of chunks it is the route of a sliding window that reaches as far.
        """
        if window is None or self.ring.world == 1 or reach_of(window) >= self.seq_len:
            return None
        reach = reach_of(window)
        if reach not in self._routes:
            blocks = self.layout.blocks(self.seq_len, self.ring.world, self.block_size)
            self._routes[reach] = make_route(self.ring, blocks, self.block_size, reach, self.q_blocks)
        return self._routes[reach]

    @cached_property
    def _routes(self) -> dict[int, WindowRoute | None]:
        """Routes of the windows asked for, by how far these reach."""
        return {}

    @cached_property
    def _windows(self) -> dict[tuple[int, Window], Tensor]:
        """Starts of the windows asked for, by batch size and window."""
        return {}

    @cached_property
    def slots(self) -> Tensor:
        """int64 (seq_len,): local place of a global position on this rank, -1 elsewhere."""
        return SequenceShard(self.all_positions, self.ring).slots

    @property
    def q_blocks(self) -> Tensor:
        """int64 (local blocks,): global numbers of this rank's blocks."""
        return self.placements[0].q_blocks


@lru_cache(maxsize=64)
def make_plan(ring: Ring, layout: Layout, seq_len: int, block_size: int, device: torch.device) -> RingPlan:
    """The plan of a sequence of ``seq_len`` tokens over the ring.

    Raises:
        UserError: the layout cannot divide this length in whole blocks.
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
