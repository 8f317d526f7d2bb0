"""Vertical-slash, chosen online at every forward: the paper's training pattern (METHOD.md section 1).

Attention under rotary embeddings concentrates on a few columns that all queries read (verticals) and on a few fixed
distances (slashes). The last queries of the sequence are the probe: their softmax over all keys, averaged,
gives the mass of each column and of each distance; the heaviest ones within the budget are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.diagonals import distances_to_diagonals
from mtraining.pattern.probe import column_and_distance_mass, share_rows


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Columns and slashes by probe mass.

    Attributes:
        top_p: share of the probe's mass that the columns, and separately the slashes, must reach; None: fixed numbers.
        top_k_columns, top_k_slashes: the fixed numbers, per head (both, with ``top_p=None``).
        max_columns, max_slashes: caps on what ``top_p`` may keep, per head, forced ones included.
        probe: queries in the probe, the last of the sequence.
        sinks: first tokens always kept as columns.
        window: shortest distances always kept as slashes (0 .. window - 1).
    """

    top_p: float | None = 0.95
    top_k_columns: int | None = None
    top_k_slashes: int | None = None
    max_columns: int = 4096
    max_slashes: int = 4096
    probe: int = 64
    sinks: int = 30
    window: int = 100

    name = "vertical_slash"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p is None:
            for option in ("top_k_columns", "top_k_slashes"):
                require(
                    self, option, getattr(self, option) is not None, "give a number, or set pattern.top_p"
                )
        else:
            require(
                self, "top_p", 0 < self.top_p <= 1, "use a share of the mass between 0 and 1, such as 0.95"
            )
            for option in ("top_k_columns", "top_k_slashes"):
                require(
                    self,
                    option,
                    getattr(self, option) is None,
                    "a fixed budget needs pattern.top_p set to null",
                )
        require(self, "probe", self.probe >= 1, "use at least one query, such as 64")
        require(self, "sinks", self.sinks >= 0, "use zero or more tokens")
        require(self, "window", self.window >= 1, "use at least 1, so that every token sees itself")
        columns, slashes = self.budgets()
        require(self, "sinks", self.sinks <= columns, f"at most the column budget of {columns}")
        require(self, "window", self.window <= slashes, f"at most the slash budget of {slashes}")

    def budgets(self) -> tuple[int, int]:
        """Largest number of columns and of slashes that a head may keep."""
        if self.top_p is None:
            assert (
                self.top_k_columns is not None and self.top_k_slashes is not None
            )  # __post_init__ saw to it
            return self.top_k_columns, self.top_k_slashes
        return self.max_columns, self.max_slashes

    @torch.no_grad()
    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        seq_len, (batch, _, q_heads, _) = shard.seq_len, q.shape
        token = torch.arange(seq_len, device=q.device)
        verticals, slashes = column_and_distance_mass(q, k, token[-self.probe :], shard, scale)
        max_columns, max_slashes = self.budgets()
        columns = shard.backend.heaviest(verticals, token < self.sinks, self.top_p, max_columns)
        distances = shard.backend.heaviest(slashes, token < self.window, self.top_p, max_slashes)
        diagonals = distances_to_diagonals(distances, seq_len, self.block_size)
        return SparseIndex(
            seq_len,
            self.block_size,
            share_rows(diagonals.to(torch.uint8), batch, q_heads, shard).bool(),
            share_rows(columns.to(torch.int32), batch, q_heads, shard).contiguous(),
        )
