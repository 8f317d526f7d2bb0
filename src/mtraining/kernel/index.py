"""The sparse index: which entries of the attention matrix are computed.

One index holds, for every batch row and query head, the union of these parts (docs/how/index-format.md):

* *slashes*, as a Toeplitz bitmap over blocks: block (i, j) is computed iff bit ``i - j`` is set, so a head costs
  O(seq_len / block_size) memory whatever the number of rows;
* *columns* (verticals), as a sorted list of token positions that every later query reads;
* *blocks*, optional, as an explicit block mask, for patterns that are not Toeplitz. Quadratic in the number of blocks,
  so each rank holds the rows of its own query blocks only, one bit a block.

Diagonals and blocks together select tiles. Tiles own the overlap: a column entry inside a selected tile belongs to the
tile, so no entry counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mtraining.kernel.placement import Piece, Placement


class Gathering(Protocol):
    """The one collective that an index needs: :class:`mtraining.pattern.Collective` has it."""

    def all_gather(self, x: Tensor) -> Tensor:
        """(...) -> (world, ...) in rank order."""
        ...


@dataclass(frozen=True)
class SparseIndex:
    """What to attend, in global block and token coordinates; the same on every rank but for ``blocks``.

    Attributes:
        seq_len: global sequence length in tokens, a multiple of ``block_size``.
        block_size: tokens a slash block spans in either direction.
        diagonals: bool (batch, q_heads, seq_len // block_size); bit d selects every block (i, i - d).
        columns: int32 (batch, q_heads, capacity), ascending token positions, padded with ``seq_len``.
        blocks: uint8 (batch, q_heads, rows, ceil(seq_len // block_size / 8)), bits of query by key blocks as
            :func:`pack_blocks` makes them, or None; the causal part is selected as well (what lies above the
            diagonal is ignored). For 512K tokens, blocks of 128 and 32 ranks: 64 KiB a head on each rank.
        block_rows: int64 (rows,), global number of the query block of each row of ``blocks``, ascending: all of this
            rank's own query blocks. None: every query block of the sequence, in order.
    """

    seq_len: int
    block_size: int
    diagonals: Tensor
    columns: Tensor
    blocks: Tensor | None = None
    block_rows: Tensor | None = None
    dense: bool = False

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
            q_blocks, k_blocks: int64, global block numbers; ``q_blocks`` as :meth:`local_blocks` takes them.
        """
        distance = q_blocks[:, None] - k_blocks[None, :]
        tiles = self.diagonals[..., distance.clamp(min=0)]
        packed = self.local_blocks(q_blocks)
        if packed is not None:
            tiles = tiles | ((packed[..., k_blocks // 8] >> (k_blocks % 8).to(torch.uint8)) & 1).bool()
        return tiles & (distance >= 0)

    def local_blocks(self, q_blocks: Tensor) -> Tensor | None:
        """Packed block lists of the given queries: uint8 (batch, q_heads, len(q_blocks), bytes); None without any.

        Args:
            q_blocks: int64, global and ascending. Where ``block_rows`` is set, exactly those rows.
        """
        if self.blocks is None:
            return None
        if self.block_rows is None:
            rows = self.blocks if q_blocks.numel() == self.num_blocks else self.blocks[:, :, q_blocks]
            return rows.contiguous()
        readable = q_blocks.device.type == "cpu"  # elsewhere comparing would wait for the device
        if q_blocks.shape != self.block_rows.shape or (
            readable and not torch.equal(q_blocks, self.block_rows)
        ):
            raise ValueError("the index holds the rows of one rank's own query blocks only; ask for those")
        return self.blocks.contiguous()

    def whole(self, comm: Gathering) -> SparseIndex:
        """The index with the block rows of every rank, the same on each; collective where rows are shared out.

        For reports and tests: its size is quadratic in the number of blocks.
        """
        if self.blocks is None or self.block_rows is None:
            return self
        rows = comm.all_gather(self.block_rows).flatten()
        shares = comm.all_gather(self.blocks.contiguous()).permute(1, 2, 0, 3, 4).flatten(2, 3)
        blocks = torch.empty_like(shares)
        blocks[:, :, rows] = shares
        return replace(self, blocks=blocks, block_rows=None)

    def extended(self, seq_len: int) -> SparseIndex:
        """The index of a longer sequence that selects the same entries among the present tokens.

        The blocks added have no diagonals and no columns of their own.

        Raises:
            ValueError: the index lists blocks, or ``seq_len`` is not a longer multiple of the block size.
        """
        more = seq_len // self.block_size - self.num_blocks
        if self.blocks is not None or more < 0 or seq_len % self.block_size:
            raise ValueError(f"an index of {self.seq_len} tokens cannot be extended to {seq_len}")
        if not more:
            return self
        return replace(
            self,
            seq_len=seq_len,
            diagonals=torch.nn.functional.pad(self.diagonals, (0, more)),
            columns=torch.where(self.columns < self.seq_len, self.columns, seq_len),
        )

    def upto(self, seq_len: int) -> SparseIndex:
        """The part of a whole index that joins the first ``seq_len`` tokens, a multiple of the block size.

        Raises:
            ValueError: the index holds one rank's rows only, or ``seq_len`` does not fit.
        """
        if seq_len == self.seq_len:
            return self
        if self.block_rows is not None or seq_len % self.block_size or not 0 < seq_len < self.seq_len:
            raise ValueError(f"an index of {self.seq_len} tokens has no part of {seq_len}")
        kept = seq_len // self.block_size
        blocks = self.blocks
        if blocks is not None:
            # Bits past the part stay in its last byte; blocks are read by number, so nobody sees them.
            blocks = blocks[:, :, :kept, : -(-kept // 8)].contiguous()
        return replace(
            self,
            seq_len=seq_len,
            diagonals=self.diagonals[..., :kept].contiguous(),
            columns=self.columns.clamp(max=seq_len),
            blocks=blocks,
        )

    def tiles_by_head(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (batch row, head, bool (num_blocks, num_blocks)): the selected tiles, one head at a time.

        Raises:
            ValueError: the index holds one rank's rows only.
        """
        if self.block_rows is not None:
            raise ValueError("the index holds one rank's block rows; make it whole first: index.whole(ring)")
        every = torch.arange(self.num_blocks, device=self.diagonals.device)
        for b in range(self.diagonals.shape[0]):
            for h in range(self.diagonals.shape[1]):
                blocks = None if self.blocks is None else self.blocks[b : b + 1, h : h + 1]
                head = replace(self, diagonals=self.diagonals[b : b + 1, h : h + 1], blocks=blocks)
                yield b, h, head.tile_mask(every, every)[0, 0]

    def to_mask(self) -> Tensor:
        """The exact boolean mask (batch, q_heads, seq_len, seq_len), query rows by key columns, in global order.

        Quadratic in ``seq_len``: for tests and pictures.
        """
        device = self.diagonals.device
        tiles = torch.stack([tiles for _, _, tiles in self.tiles_by_head()])
        tiles = tiles.unflatten(0, self.diagonals.shape[:2])
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

        Raises:
            ValueError: the index holds one rank's rows only.
        """
        n, size = self.num_blocks, self.block_size
        device = self.diagonals.device
        if self.blocks is None:
            tiles_of_diagonal = torch.arange(n, 0, -1, device=device, dtype=torch.float64)
            slash = (self.diagonals * tiles_of_diagonal).sum(-1) * size * size
        else:
            counts = [tiles.sum(dtype=torch.float64) for _, _, tiles in self.tiles_by_head()]
            slash = torch.stack(counts).view(self.diagonals.shape[:2]) * size * size
        blocks_reading_column = (n - self.columns // size).clamp(min=0).double()
        blocks_reading_column[self.columns >= self.seq_len] = 0
        return slash + blocks_reading_column.sum(-1) * size

    def cost(self) -> Tensor:
        """:meth:`computed_area` over the area of all causal tiles: float64 (batch, q_heads). Time goes by it.

        It is more than the density, and on short sequences may be more than 1: a column inside a selected tile is
        multiplied a second time, and masked.
        """
        return self.computed_area() / self._causal_area

    def density(self) -> Tensor:
        """Share of the causal tiles' area that is selected: float64 (batch, q_heads), 0.0 to 1.0, 1.0 for dense.

        Whole tiles, and each column from its own block down to the last row; tiles own the overlap.
        """
        n, size = self.num_blocks, self.block_size
        # What tiles hold of a block of keys, in tiles: diagonal d crosses it unless it leaves the matrix before.
        if self.blocks is None:
            held = self.diagonals.double().cumsum(-1).flip(-1)
        else:
            counts = [tiles.sum(0, dtype=torch.float64) for _, _, tiles in self.tiles_by_head()]
            held = torch.stack(counts).view(self.diagonals.shape)
        used = self.columns < self.seq_len
        block = (self.columns // size).long().clamp(max=n - 1)
        alone = (n - block - held.gather(-1, block)) * used
        return (held.sum(-1) * size * size + alone.sum(-1) * size) / self._causal_area

    @property
    def _causal_area(self) -> float:
        """Query-key entries of all causal tiles."""
        return self.num_blocks * (self.num_blocks + 1) / 2 * self.block_size**2

    def nbytes(self) -> int:
        """Bytes that the index holds on its device."""
        held = (self.diagonals, self.columns, self.blocks)
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def placement(self) -> Placement:
        """The placement of a sequence that one process holds whole."""
        blocks = torch.arange(self.num_blocks, device=self.diagonals.device)
        every = slice(0, self.num_blocks)
        whole = Piece(every, every, causal=True)
        return Placement(blocks, blocks, self.num_blocks, step=(1, 0), pieces=(whole,))


def dense_index(batch: int, q_heads: int, seq_len: int, block_size: int, device: torch.device) -> SparseIndex:
    """Every causal block selected: full attention as a sparse index."""
    diagonals = torch.ones(batch, q_heads, seq_len // block_size, dtype=torch.bool, device=device)
    columns = torch.empty(batch, q_heads, 0, dtype=torch.int32, device=device)
    return SparseIndex(seq_len, block_size, diagonals, columns, dense=True)


def pack_blocks(mask: Tensor) -> Tensor:
    """Bool (..., n) -> uint8 (..., ceil(n / 8)): entry j is bit j % 8 of byte j // 8."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8)
