"""Vertical-slash, chosen online at every forward: the training pattern of arXiv 2510.18830 (docs/how/estimation.md).

Attention under rotary embeddings concentrates on a few columns that all queries read (verticals) and on a few fixed
distances (slashes). A probe of some queries is scored against all keys. The sum of their softmax gives the mass of each
column and of each distance, and the heaviest ones within the budget are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mtraining.kernel import EstimationKernels, SparseIndex
from mtraining.kernel.reference.estimate import diagonal_mass
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.by_document import estimate_documents
from mtraining.pattern.diagonals import distances_to_diagonals, heaviest_diagonals, tiles_by_diagonal
from mtraining.pattern.probe import (
    PLACEMENTS,
    column_and_slash_mass,
    owned_rows,
    probe_positions,
    sequence_scope,
    share_choice,
)

SLASH_UNITS = ("token", "block")


@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Columns and slashes by probe mass.

    Attributes:
        top_p: share of the probe's mass that the columns, and separately the slashes, must reach; None: fixed numbers.
        top_k_columns: the fixed number of columns, per head (with ``top_p=None``).
        top_k_slashes: the fixed number of token distances, per head (with ``top_p=None`` and ``slash_by=token``).
        max_columns: cap on the columns that ``top_p`` may keep, per head, forced ones included.
        max_slashes: the same for token distances (``slash_by=token``).
        slash_by: what slashes are chosen by. ``token``: the heaviest token distances, each then executed as the one or
            two block diagonals that contain it (the paper). ``block``: the heaviest block diagonals themselves.
        slash_density: budget of ``slash_by=block``, as a share of all causal tiles: the cap on what ``top_p`` may keep,
            or with ``top_p=None`` what is spent.
        probe: queries in the probe.
        probe_at: where they stand: ``last`` (the paper), ``spread`` over the sequence, or ``mixed``, half of each.
        sinks: first tokens always kept as columns.
        window: shortest distances always kept as slashes (0 .. window - 1).
    """

    top_p: float | None = 0.95
    top_k_columns: int | None = None
    top_k_slashes: int | None = None
    max_columns: int = 4096
    max_slashes: int = 4096
    slash_by: str = "token"
    slash_density: float = 0.05
    probe: int = 64
    probe_at: str = "last"
    sinks: int = 30
    window: int = 100

    name = "vertical_slash"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, known in (("slash_by", SLASH_UNITS), ("probe_at", PLACEMENTS)):
            require(self, option, getattr(self, option) in known, f"choose one of {', '.join(known)}")
        by_token = self.slash_by == "token"
        if self.top_p is None:
            for option in ("top_k_columns", "top_k_slashes") if by_token else ("top_k_columns",):
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
        require(
            self,
            "top_k_slashes",
            by_token or self.top_k_slashes is None,
            "pattern.slash_by=block has its budget in pattern.slash_density",
        )
        require(self, "slash_density", 0 < self.slash_density <= 1, "use a share of the tiles such as 0.05")
        require(self, "probe", self.probe >= 1, "use at least one query, such as 64")
        require(self, "sinks", self.sinks >= 0, "use zero or more tokens")
        require(self, "window", self.window >= 1, "use at least 1, so that every token sees itself")
        columns = self.column_budget()
        require(self, "sinks", self.sinks <= columns, f"at most the column budget of {columns}")
        if by_token:
            slashes = self.distance_budget()
            require(self, "window", self.window <= slashes, f"at most the slash budget of {slashes}")

    def column_budget(self) -> int:
        """Largest number of columns that a head may keep."""
        return self.max_columns if self.top_k_columns is None else self.top_k_columns

    @property
    def slash_size(self) -> int:
        """Tokens that a slash spans: ``block_size`` for block diagonals, 1 for token distances."""
        return self.block_size if self.slash_by == "block" else 1

    def distance_budget(self) -> int:
        """Largest number of token distances that a head may keep."""
        return self.max_slashes if self.top_k_slashes is None else self.top_k_slashes

    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        return estimate_by_head(q, k, shard, scale, (self,) * q.shape[2])

    def select(
        self, verticals: Tensor, slashes: Tensor, backend: EstimationKernels, tiles: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The budget applied to probe masses.

        Args:
            verticals: of columns, (rows, seq_len).
            slashes: of distances or block diagonals, (rows, seq_len // slash_size).
            tiles: of block diagonals, int64 (rows, seq_len // block_size), where starts leave fewer than causality.

        Returns:
            columns int64 (rows, min(column_budget, seq_len)), ascending, padded with seq_len; diagonals bool (rows,
            seq_len // block_size).
        """
        seq_len = verticals.shape[1]
        token = torch.arange(seq_len, device=verticals.device)
        columns = backend.heaviest(verticals, token < self.sinks, self.top_p, self.column_budget())
        if self.slash_by == "token":
            distances = backend.heaviest(slashes, token < self.window, self.top_p, self.distance_budget())
            return columns, distances_to_diagonals(distances, seq_len, self.block_size)
        reach = -(-(self.window - 1) // self.block_size)  # the farthest diagonal that the window crosses
        forced = torch.arange(slashes.shape[1], device=slashes.device) <= reach
        return columns, heaviest_diagonals(slashes, forced, self.top_p, self.slash_density, tiles)


@torch.no_grad()
def estimate_by_head(
    q: Tensor, k: Tensor, shard: SequenceShard, scale: float, heads: tuple[VerticalSlash, ...]
) -> SparseIndex:
    """One estimate for query heads that differ in budget: one probe, one pass over the keys.

    Args:
        q, k, shard, scale: see :meth:`Pattern.estimate`.
        heads: one pattern per query head, alike in ``block_size``, ``probe`` and ``probe_at``; with documents in
            ``slash_by`` too.
    """
    if shard.apart:
        return estimate_documents(q, k, shard, scale, heads)
    batch, _, q_heads, _ = q.shape
    one = heads[0]
    # Budgets and ties are those of the blocks that hold a real token, however much padding follows.
    seq_len = shard.covered(one.block_size)
    probe = probe_positions(one.probe, one.probe_at, shard.length, q.device)
    size = min(pattern.slash_size for pattern in heads)
    probe, scope = sequence_scope(probe, batch, shard, size)
    verticals, slashes = column_and_slash_mass(q, k, probe, shard, scale, size, scope=scope)
    verticals, slashes = verticals[:, :seq_len], slashes[:, : seq_len // size]
    tiles = None
    if shard.starts is not None:
        of_batch = tiles_by_diagonal(shard.starts, seq_len, one.block_size)
        tiles = of_batch[owned_rows(verticals, batch, q_heads, shard) // q_heads]
    if heads.count(one) == len(heads):
        columns, diagonals = one.select(verticals, slashes, shard.backend, tiles)
    else:
        rows, capacity = verticals.shape[0], max(pattern.column_budget() for pattern in heads)
        columns = torch.full((rows, min(capacity, seq_len)), seq_len, dtype=torch.int64, device=q.device)
        diagonals = torch.zeros(rows, seq_len // one.block_size, dtype=torch.bool, device=q.device)
        for pattern, mine in _rows_by_pattern(heads, rows, shard.comm.rank, q.device):
            mass = slashes[mine]
            if pattern.slash_size > size:
                mass = diagonal_mass(mass, pattern.slash_size)
            left = None if tiles is None else tiles[mine]
            chosen, diagonals[mine] = pattern.select(verticals[mine], mass, shard.backend, left)
            columns[mine, : chosen.shape[1]] = chosen
    columns, diagonals = share_choice(columns, diagonals, batch, q_heads, shard)
    return SparseIndex(seq_len, one.block_size, diagonals, columns).extended(shard.seq_len)


@lru_cache(maxsize=256)
def _rows_by_pattern(
    heads: tuple[VerticalSlash, ...], rows: int, rank: int, device: torch.device
) -> list[tuple[VerticalSlash, Tensor]]:
    """Which of a rank's ``rows`` rows of (batch, q_heads), dealt in order, each pattern chooses; kept on the device."""
    mine = [heads[row % len(heads)] for row in range(rank * rows, (rank + 1) * rows)]
    return [
        (pattern, torch.tensor([row for row, owner in enumerate(mine) if owner == pattern], device=device))
        for pattern in dict.fromkeys(mine)
    ]
