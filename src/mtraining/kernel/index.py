"""The sparse index: which entries of the attention matrix are computed.

One index holds, for every batch row and query head, the union of these parts (METHOD.md section 1 and 2):

* *slashes*, as a Toeplitz bitmap over blocks: block (i, j) is computed iff bit ``i - j`` is set, so a head costs
  O(seq_len / block_size) memory whatever the number of rows;
* *columns* (verticals), as a sorted list of token positions that every later query reads;
* *blocks*, optional, as an explicit block mask, for patterns that are not Toeplitz; quadratic in the number of blocks.

Diagonals and blocks together select tiles. Tiles own the overlap: a column entry inside a selected tile belongs to the
tile, so no entry counts twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mtraining.kernel.placement import Placement


@dataclass(frozen=True)
class SparseIndex:
    """What to attend, in global block and token coordinates, the same on every rank.

    Attributes:
        seq_len: global sequence length in tokens, a multiple of ``block_size``.
        block_size: tokens a slash block spans in either direction.
        diagonals: bool (batch, q_heads, seq_len // block_size); bit d selects every block (i, i - d).
        columns: int32 (batch, q_heads, capacity), ascending token positions, padded with ``seq_len``.
        blocks: bool (batch, q_heads, seq_len // block_size, seq_len // block_size), query by key blocks, or None; its
            causal part is selected as well (what lies above the diagonal is ignored).
    """

    seq_len: int
    block_size: int
    diagonals: Tensor
    columns: Tensor
    blocks: Tensor | None = None

    @property
    def num_blocks(self) -> int:
        return self.seq_len // self.block_size

    @cached_property
    def column_counts(self) -> Tensor:
        """int32 (batch, q_heads): columns in use, the padding left out."""
        return (self.columns < self.seq_len).sum(-1, dtype=torch.int32)

    def tile_mask(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        """Which slash tiles join the given blocks: bool (batch, q_heads, len(q_blocks), len(k_blocks)).

        Args:
            q_blocks, k_blocks: global block numbers, int64, on the index's device.
        """
        distance = q_blocks[:, None] - k_blocks[None, :]
        tiles = self.diagonals[..., distance.clamp(min=0)]
        if self.blocks is not None:
            tiles = tiles | self.blocks[..., q_blocks[:, None], k_blocks[None, :]]
        return tiles & (distance >= 0)

    def to_mask(self) -> Tensor:
        """The exact boolean mask (batch, q_heads, seq_len, seq_len), query rows by key columns, in global order.

        Quadratic in ``seq_len``: for tests and pictures.
        """
        device = self.diagonals.device
        blocks = torch.arange(self.num_blocks, device=device)
        tiles = self.tile_mask(blocks, blocks)
        mask = tiles.repeat_interleave(self.block_size, -2).repeat_interleave(self.block_size, -1)
        is_column = torch.zeros(*self.columns.shape[:2], self.seq_len + 1, dtype=torch.bool, device=device)
        is_column.scatter_(2, self.columns.long(), True)
        mask |= is_column[:, :, None, : self.seq_len]
        token = torch.arange(self.seq_len, device=device)
        return mask & (token[:, None] >= token[None, :])

    def computed_area(self) -> Tensor:
        """Query-key entries that a kernel multiplies: float64 (batch, q_heads).

        Whole slash tiles, and for each block of queries the causal prefix of columns: a masked entry of a
        tile costs as much as a kept one.
        """
        n, size = self.num_blocks, self.block_size
        device = self.diagonals.device
        if self.blocks is None:
            tiles_of_diagonal = torch.arange(n, 0, -1, device=device, dtype=torch.float64)
            slash = (self.diagonals * tiles_of_diagonal).sum(-1) * size * size
        else:
            every = torch.arange(n, device=device)
            slash = self.tile_mask(every, every).sum((-2, -1), dtype=torch.float64) * size * size
        blocks_reading_column = (n - self.columns // size).clamp(min=0).double()
        blocks_reading_column[self.columns >= self.seq_len] = 0
        return slash + blocks_reading_column.sum(-1) * size

    def density(self) -> Tensor:
        """Computed area over the area of all causal tiles: float64 (batch, q_heads), 1.0 for dense attention."""
        causal_tiles = self.num_blocks * (self.num_blocks + 1) / 2
        return self.computed_area() / (causal_tiles * self.block_size**2)

    def nbytes(self) -> int:
        """Bytes that the index holds on its device."""
        return (
            self.diagonals.numel() * self.diagonals.element_size()
            + self.columns.numel() * self.columns.element_size()
        )

    def placement(self) -> Placement:
        """The placement of a sequence that one process holds whole."""
        blocks = torch.arange(self.num_blocks, device=self.diagonals.device)
        return Placement(blocks, blocks, self.num_blocks, step=(1, 0))


def dense_index(batch: int, q_heads: int, seq_len: int, block_size: int, device: torch.device) -> SparseIndex:
    """Every causal block selected: full attention as a sparse index."""
    diagonals = torch.ones(batch, q_heads, seq_len // block_size, dtype=torch.bool, device=device)
    columns = torch.empty(batch, q_heads, 0, dtype=torch.int32, device=device)
    return SparseIndex(seq_len, block_size, diagonals, columns)
