"""The sparse index: which entries of the attention matrix are computed.

One index holds, for every batch row and query head, the union of these parts (docs/how/index-format.md):

* *slashes*, as a Toeplitz bitmap over blocks: block (i, j) is computed iff bit ``i - j`` is set, so a head costs
  O(seq_len / block_size) memory whatever the number of rows;
* *columns* (verticals), as a sorted list of token positions that every later query reads;
* *blocks*, optional, as an explicit block mask, for patterns that are not Toeplitz. Quadratic in the number of blocks,
  so each rank holds the rows of its own query blocks only, one bit a block.

Diagonals and blocks together select tiles. Tiles own the overlap: a column entry inside a selected tile belongs to the
tile, so no entry counts twice.

``starts`` bounds all of them from below: a query attends to selected keys from its start on
(:mod:`mtraining.kernel.starts`). A tile that lies before the starts of all its queries is not selected.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mtraining.kernel.placement import Piece, Placement
from mtraining.kernel.starts import query_ends

K = TypeVar("K", bound=Hashable)


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
        columns: int32 (batch, q_heads, capacity), ascending token positions, padded with ``seq_len``. A position may
            come several times where every query that may attend to it has a tile that holds it.
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
    starts: Tensor | None = None

    @property
    def num_blocks(self) -> int:
        return self.seq_len // self.block_size

    @cached_property
    def column_counts(self) -> Tensor:
        """int32 (batch, q_heads): columns in use, padding and repetitions left out."""
        return self.first_of_columns.sum(-1, dtype=torch.int32)

    @property
    def first_of_columns(self) -> Tensor:
        """bool, like ``columns``: a column, and not the one before it again."""
        again = torch.nn.functional.pad(self.columns[..., 1:] == self.columns[..., :-1], (1, 0))
        return (self.columns < self.seq_len) & ~again

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
        tiles = tiles & (distance >= 0)
        if self.starts is not None:
            # No kept tile is wholly before the starts: the first row of query block i attends to a key of block
            # ``first_blocks[i]``, and every later one up to i.
            tiles = tiles & (k_blocks >= self.first_blocks[:, q_blocks, None])[:, None]
        return tiles

    @cached_property
    def first_blocks(self) -> Tensor:
        """int32 (batch, num_blocks): the first key block that any query of a block may attend; needs ``starts``."""
        assert self.starts is not None
        return self.starts[:, :: self.block_size] // self.block_size

    @cached_property
    def end_blocks(self) -> Tensor:
        """int32 (batch, num_blocks): the end (exclusive) of the query blocks that may attend to a key block; needs
        ``starts``."""
        assert self.starts is not None
        last_keys = torch.arange(1, self.num_blocks + 1, device=self.starts.device) * self.block_size - 1
        return self._blocks_up_to(query_ends(self.starts, last_keys)).to(torch.int32)

    def _blocks_up_to(self, ends: Tensor) -> Tensor:
        """Blocks that hold the first ``ends`` tokens."""
        return (ends + self.block_size - 1) // self.block_size

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
            starts=None if self.starts is None else _repeat_last(self.starts, more * self.block_size),
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
            starts=None if self.starts is None else self.starts[:, :seq_len].contiguous(),
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
                starts = None if self.starts is None else self.starts[b : b + 1]
                diagonals = self.diagonals[b : b + 1, h : h + 1]
                head = replace(self, diagonals=diagonals, blocks=blocks, starts=starts)
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
        mask &= token[:, None] >= token[None, :]
        if self.starts is not None:
            mask &= (token >= self.starts[..., None])[:, None]
        return mask

    def computed_area(self) -> Tensor:
        """Query-key entries that a kernel multiplies: float64 (batch, q_heads).

        Whole slash tiles, and for each block of queries the columns that any of them may attend: a masked entry of
        a tile costs as much as a kept one.

        Raises:
            ValueError: the index holds one rank's rows only.
        """
        size = self.block_size
        if self.blocks is None:
            # Of query block i, the diagonals of distance 0 to i less the first key block.
            upto = self.diagonals.cumsum(-1, dtype=torch.float64)
            slash = upto.gather(-1, self._reach[:, None].expand_as(self.diagonals)).sum(-1) * size * size
        else:
            counts = [tiles.sum(dtype=torch.float64) for _, _, tiles in self.tiles_by_head()]
            slash = torch.stack(counts).view(self.diagonals.shape[:2]) * size * size
        blocks_reading_column = (self._column_ends - self.columns // size).clamp(min=0).double()
        blocks_reading_column[~self.first_of_columns] = 0
        return slash + blocks_reading_column.sum(-1) * size

    def cost(self) -> Tensor:
        """:meth:`computed_area` over the area of all tiles that causality and ``starts`` leave: float64 (batch,
        q_heads). Time goes by it.

        It is more than the density, and on short sequences may be more than 1: a column inside a selected tile is
        multiplied a second time, and masked.
        """
        return self.computed_area() / self._whole_area

    def density(self) -> Tensor:
        """Share that is selected of the area of all tiles that causality and ``starts`` leave: float64 (batch,
        q_heads), 0.0 to 1.0, 1.0 for dense.

        Whole tiles, and each column from its own block down to the last row that may attend to it; tiles own the
        overlap.
        """
        size, used = self.block_size, self.first_of_columns
        block = (self.columns // size).long().clamp(max=self.num_blocks - 1)
        last = (self._column_ends - 1).clamp(min=block)
        # Of each head its tiles, and of each column those that hold it.
        if self.blocks is None:
            upto = self.diagonals.double().cumsum(-1)
            tiles = upto.gather(-1, self._reach[:, None].expand_as(self.diagonals)).sum(-1)
            held = upto.gather(-1, last - block)
        else:
            grids = [tiles.cumsum(0, dtype=torch.float64) for _, _, tiles in self.tiles_by_head()]
            tiles = torch.stack([grid[-1].sum() for grid in grids]).view(self.diagonals.shape[:2])
            places = zip(grids, last.flatten(0, 1), block.flatten(0, 1), strict=True)
            held = torch.stack([grid[rows, keys] for grid, rows, keys in places]).view_as(last)
        alone = (last + 1 - block - held) * used
        return (tiles * size * size + alone.sum(-1) * size) / self._whole_area

    @property
    def _column_ends(self) -> Tensor:
        """int64, like ``columns``: the end (exclusive) of the query blocks that may attend to each."""
        columns = self.columns.long()
        if self.starts is None:
            return torch.full_like(columns, self.num_blocks)
        return self._blocks_up_to(query_ends(self.starts, columns.flatten(1))).view_as(columns)

    @property
    def _whole_area(self) -> Tensor:
        """Query-key entries of all tiles that causality and ``starts`` leave: float64 (batch, 1)."""
        return (self._reach + 1).sum(-1, keepdim=True, dtype=torch.float64) * self.block_size**2

    @property
    def _reach(self) -> Tensor:
        """int64 (batch, num_blocks): the farthest block distance at which a query block may attend."""
        own = torch.arange(self.num_blocks, device=self.diagonals.device)
        if self.starts is None:
            return own.expand(self.diagonals.shape[0], -1)
        return own - self.first_blocks

    def nbytes(self) -> int:
        """Bytes that the index holds on its device; ``starts``, which all layers share, are left out."""
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


def joined(indices: Sequence[SparseIndex]) -> SparseIndex:
    """One index with the heads of all, in order; they are alike in all else, and list no blocks."""
    diagonals = torch.cat([index.diagonals for index in indices], 1)
    columns = torch.cat([index.columns for index in indices], 1)
    return replace(indices[0], diagonals=diagonals, columns=columns)


def joined_where_alike(indices: Mapping[K, SparseIndex]) -> Iterator[tuple[list[K], SparseIndex]]:
    """Join indices that have the same shapes and starts, so that few kernels look at many layers.

    Yields:
        names of some indices, and one index with the heads of all of them, in that order. One that lists blocks comes
        alone.
    """
    groups: dict[Hashable, list[K]] = {}
    for name, index in indices.items():
        shapes = (index.seq_len, index.block_size, index.diagonals.shape, index.columns.shape)
        alike = (*shapes, index.dense, id(index.starts)) if index.blocks is None else (name,)
        groups.setdefault(alike, []).append(name)
    for names in groups.values():
        first = indices[names[0]]
        yield names, first if len(names) == 1 else joined([indices[name] for name in names])


def _repeat_last(starts: Tensor, more: int) -> Tensor:
    """Starts of a sequence with ``more`` tokens behind it, which belong to the last token's document."""
    return torch.cat([starts, starts[:, -1:].expand(-1, more)], -1)


def pack_blocks(mask: Tensor) -> Tensor:
    """Bool (..., n) -> uint8 (..., ceil(n / 8)): entry j is bit j % 8 of byte j // 8."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    weights = 2 ** torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (padded * weights).sum(-1, dtype=torch.uint8)
