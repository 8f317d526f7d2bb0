"""Which columns a block of queries must not see, as bits: one for each (query block, column).

A bit is set where a slash tile of the block holds the column, which then belongs to that tile. It is also set where the
column lies after the block or in a block of keys before all of its starts, and in the padding. A bit costs one look-up
in the head's bitmap. Making the bits once a call saves that look-up in each kernel and tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mtraining.kernel.index import SparseIndex
from mtraining.kernel.starts import local_ends_of_keys, starts_of_rows
from mtraining.kernel.triton.launch import launch
from mtraining.kernel.triton.lists import Bitmaps, bitmaps

# A program packs 32 words of 32 columns each, for 16 blocks of queries.
_WORDS = 32
_ROWS = 16
# The widest tile of columns. Words are made for whole tiles; past the capacity every bit is set.
_MULTIPLE = 128


class QueryTables(NamedTuple):
    """What query-major kernels read of :class:`ColumnTables`; the last three are None without starts."""

    columns: Any
    words: Any
    q_blocks: Any
    before: Any
    upto: Any
    starts: Any
    begin: Any
    masked: Any


class KeyTables(NamedTuple):
    """What key-major kernels read of :class:`ColumnTables`; the last two are None without starts."""

    columns: Any
    words: Any
    q_blocks: Any
    first_slot: Any
    first_seen: Any
    last_seen: Any
    ends: Any


@dataclass(frozen=True)
class ColumnTables:
    """What the column kernels read beside q, k and v.

    Attributes:
        columns: int32 (batch, q_heads, capacity).
        words: int32 (batch, q_heads, query blocks, words): bit c % 32 of word c // 32 hides column c.
        q_blocks: int32 (query blocks,).
        before: int32 (batch, q_heads, query blocks), columns before the block's first token.
        upto: int32, likewise, columns up to the last one that the block may see; 0 where it sees none.
        first_seen: int32 (batch, q_heads, words), the first local block that may see one of a word's columns; the
            number of blocks where none does.
        first_slot: int32 (num_blocks + 1,), the first local block whose global number is at least the given one.
        starts: int32 (batch, local queries), the first key of each, a global position; None without starts, as all that
            follows.
        begin, masked: int32 (batch, q_heads, query blocks), columns before the start of the block's first token, and of
            its last: from the one on the block visits columns, up to the other some tokens must not see them.
        last_seen: int32 (batch, q_heads, words), the end (exclusive) of the local blocks that may see one of a word's
            columns; 0 where none does.
        ends: int32 (batch, q_heads, capacity), the end of the local queries that may attend to each column.
    """

    columns: Tensor
    words: Tensor
    q_blocks: Tensor
    before: Tensor
    upto: Tensor
    first_seen: Tensor
    first_slot: Tensor
    starts: Tensor | None
    begin: Tensor | None
    masked: Tensor | None
    last_seen: Tensor | None
    ends: Tensor | None

    def for_queries(self) -> QueryTables:
        bounds = (self.starts, self.begin, self.masked)
        return QueryTables(self.columns, self.words, self.q_blocks, self.before, self.upto, *bounds)

    def for_keys(self) -> KeyTables:
        bounds = (self.last_seen, self.ends)
        return KeyTables(self.columns, self.words, self.q_blocks, self.first_slot, self.first_seen, *bounds)


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def tables_of_backward(index: SparseIndex, q_blocks: Tensor, ck: Tensor) -> ColumnTables:
    """The tables of a backward pass over the columns ``ck``.

    Two kernels of the pass ask for them. The first makes and keeps them, the second takes them away.
    """
    made = _kept.pop(ck, None)
    if made is not None and made[0] is index and made[1] is q_blocks:
        return made[2]
    tables = column_tables(index, q_blocks)
    _kept[ck] = index, q_blocks, tables
    return tables


def column_tables(index: SparseIndex, q_blocks: Tensor) -> ColumnTables:
    """The tables of one pass, built on the device."""
    columns = index.columns.contiguous()
    batch, heads, capacity = columns.shape
    rows, numbers = q_blocks.numel(), q_blocks.int()
    words = triton.cdiv(capacity, _MULTIPLE) * _MULTIPLE // 32
    bits = torch.empty(batch, heads, rows, words, dtype=torch.int32, device=columns.device)
    upto = torch.zeros(batch, heads, rows, dtype=torch.int32, device=columns.device)
    first_seen = torch.full((batch, heads, words), rows, dtype=torch.int32, device=columns.device)
    last_seen = None if index.starts is None else torch.zeros_like(first_seen)
    selected, row_bytes = bitmaps(index, q_blocks)
    launch(_hidden_kernel, (batch * heads, triton.cdiv(words, _WORDS), triton.cdiv(rows, _ROWS)))(
        selected, columns, numbers, bits, upto, first_seen, last_seen, index.num_blocks, capacity, rows, words,
        row_bytes, HAS_BLOCKS=row_bytes > 0, SIZE=index.block_size, WORDS=_WORDS, ROWS=_ROWS,
    )  # fmt: skip
    first_tokens = numbers * index.block_size
    before = _columns_before(columns, first_tokens.expand(batch, -1))
    every = torch.arange(index.num_blocks + 1, dtype=torch.int32, device=columns.device)
    first_slot = torch.searchsorted(numbers, every, out_int32=True)
    tables = (columns, bits, numbers, before, upto, first_seen, first_slot)
    if index.starts is None:
        return ColumnTables(*tables, *(None,) * 5)
    begin = _columns_before(columns, index.starts[:, first_tokens])
    masked = _columns_before(columns, index.starts[:, first_tokens + (index.block_size - 1)])
    ends = local_ends_of_keys(index.starts, q_blocks, index.block_size)
    # What stands for the padding is never seen: its bits are set.
    at = columns.clamp(max=index.seq_len - 1).flatten(1).long()
    return ColumnTables(
        *tables, starts_of_rows(index.starts, q_blocks, index.block_size), begin, masked, last_seen,
        ends.gather(1, at).view_as(columns),
    )  # fmt: skip


def _columns_before(columns: Tensor, positions: Tensor) -> Tensor:
    """How many columns of each head stand before each position (batch, n): int32 (batch, q_heads, n)."""
    wanted = positions[:, None].expand(-1, columns.shape[1], -1).contiguous()
    return torch.searchsorted(columns, wanted, out_int32=True)


@triton.jit(do_not_specialize=["num_blocks", "capacity", "rows", "words", "row_bytes"])
def _hidden_kernel(
    selected: Bitmaps, columns, q_blocks, bits, upto, first_seen, last_seen, num_blocks, capacity, rows, words,
    row_bytes, HAS_BLOCKS: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Pack, for every (query block, column), the bit that hides the column.

    Also record the last column that each block sees (``upto``, by atomic max), and the first block that sees each word
    (``first_seen``, by atomic min); with starts the last one as well. Max and min do not depend on order, so results
    are deterministic.
    """
    head = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 32)
    at = word[:, None] * 32 + lane[None, :]
    column = tl.load(columns + head * capacity + at, mask=at < capacity, other=num_blocks * SIZE)
    key = column // SIZE  # [WORDS, 32]
    first = tl.program_id(2) * ROWS
    earliest = tl.zeros([WORDS], tl.int32) + rows
    latest = tl.zeros([WORDS], tl.int32)
    for i in range(first, tl.minimum(first + ROWS, rows)):
        query = tl.load(q_blocks + i)
        seen = query >= key
        if selected.first_blocks is not None:
            bounds = selected.first_blocks + head // selected.heads * num_blocks
            seen = seen & (key >= tl.load(bounds + query))
        hide = tl.load(selected.diagonals + head * num_blocks + (query - key), mask=seen, other=1).to(
            tl.int32
        )
        if HAS_BLOCKS:
            row = selected.blocks + (head * rows + i) * row_bytes
            hide |= (tl.load(row + key // 8, mask=seen, other=0).to(tl.int32) >> (key % 8)) & 1
        packed = tl.sum((hide != 0).to(tl.int32) << lane[None, :], 1)  # [WORDS]
        tl.store(bits + (head * rows + i) * words + word, packed, mask=word < words)
        some = packed != -1
        last = tl.max(tl.where(some, word + 1, 0), 0) * 32
        tl.atomic_max(upto + head * rows + i, tl.minimum(last, capacity), mask=last > 0, sem="relaxed")
        earliest = tl.where(some, tl.minimum(earliest, i), earliest)
        latest = tl.where(some, i + 1, latest)
    there = (word < words) & (earliest < rows)
    tl.atomic_min(first_seen + head * words + word, earliest, mask=there, sem="relaxed")
    if selected.first_blocks is not None:
        tl.atomic_max(last_seen + head * words + word, latest, mask=there, sem="relaxed")
