"""Row lists of slash tiles for the kernels, built on the device without a host synchronisation.

There are two kinds, and ``TileLists.toeplitz`` says which:

* *Toeplitz*: local query and key blocks are arithmetic progressions of one step. This holds for any whole sequence, and
  in the striped and the contiguous layout. A selected diagonal is then the same shift ``i - j`` between local blocks in
  every row, so one ascending list per head serves all rows in both directions. Entry u stands for the shift
  u - (key blocks - 1). ``bounds`` counts the entries below each u, which gives every row its slice. O(blocks) memory a
  head.
* *explicit*: one list of local blocks per row, nearest block first, for other layouts and for block masks.

In both kinds the tile on the causal diagonal, if selected, is the first of its row.

Starts (``SparseIndex.starts``) cut each row off at its far end. Explicit lists leave such tiles out. A Toeplitz list
serves all rows, so a kernel reads from ``reach`` where its row ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtraining.kernel.index import SparseIndex
from mtraining.kernel.placement import Placement
from mtraining.kernel.starts import first_local_keys, local_query_ends
from mtraining.kernel.triton.common import RowLists
from mtraining.kernel.triton.launch import launch

_CHUNK = 1024


class Bitmaps(NamedTuple):
    """What selects tiles: ``diagonals`` int8 (batch, heads, num_blocks), and ``blocks`` as ``SparseIndex`` has them for
    the local query blocks. Without blocks the diagonals stand in their place and are not read.

    ``first_blocks`` int32 (batch, num_blocks), the first key block that a query block may attend, and the number of
    ``heads``; both None without starts.
    """

    diagonals: Any
    blocks: Any
    first_blocks: Any
    heads: Any


class Row(NamedTuple):
    """A row of blocks: its number among all heads' rows, its head, and the global number of its block."""

    number: Any
    head: Any
    block: Any


def bitmaps(index: SparseIndex, q_blocks: Tensor) -> tuple[Bitmaps, int]:
    """The index as kernels read it, and the bytes of a row of its blocks (0: it has none)."""
    diagonals, blocks = index.diagonals.contiguous(), index.local_blocks(q_blocks)
    bounds = (None, None) if index.starts is None else (index.first_blocks, diagonals.shape[1])
    if blocks is None:
        return Bitmaps(diagonals.view(torch.int8), diagonals, *bounds), 0
    return Bitmaps(diagonals.view(torch.int8), blocks, *bounds), blocks.shape[-1]


@dataclass(frozen=True)
class TileLists:
    """Lists of one direction.

    Attributes:
        entries: int32, with at least one spare element at the end, because the kernels read one entry ahead.
        bounds: int32. Toeplitz: (batch * heads, rows + columns), entries below each shift. Explicit:
            (batch * heads, rows), list lengths.
        row_blocks, col_blocks: int32, global block numbers.
        diagonal: Toeplitz: the entry of the causal diagonal, -1 where this call has none.
        toeplitz: which kind.
        reach: None without starts. Else what tells, ``key_major`` or not, how far each token of the rows reaches, in
            local positions: int32 (batch, local queries), the first local key that each query may attend; or (batch,
            local keys), the end of the local queries that may attend to each key.
    """

    entries: Tensor
    bounds: Tensor
    row_blocks: Tensor
    col_blocks: Tensor
    diagonal: int
    toeplitz: bool
    reach: Callable[[bool], Tensor] | None

    def for_queries(self) -> RowLists:
        """As query-major kernels take them."""
        reach = None if self.reach is None else self.reach(False)
        return RowLists(self.entries, self.bounds, self.row_blocks, self.col_blocks, reach)

    def for_keys(self) -> RowLists:
        """As key-major kernels take them: a Toeplitz list by query block serves them too."""
        reach = None if self.reach is None else self.reach(True)
        rows, cols = self.row_blocks, self.col_blocks
        if self.toeplitz:
            rows, cols = cols, rows
        return RowLists(self.entries, self.bounds, rows, cols, reach)


def _reach_of(index: SparseIndex, placement: Placement) -> Callable[[bool], Tensor] | None:
    starts = index.starts
    if starts is None:
        return None

    def reach(key_major: bool) -> Tensor:
        table = local_query_ends if key_major else first_local_keys
        return table(starts, placement, index.block_size)

    return reach


def tile_lists(index: SparseIndex, placement: Placement, key_major: bool) -> TileLists:
    """The selected tiles of each local query block (or, ``key_major``, of each visiting key block).

    A Toeplitz list comes by query block, whatever is asked for: it serves both.
    """
    row_blocks, col_blocks = placement.q_blocks.int(), placement.k_blocks.int()
    if placement.step is not None and index.blocks is None:
        return _toeplitz(index, placement, row_blocks, col_blocks)
    if key_major:
        row_blocks, col_blocks = col_blocks, row_blocks
    return _explicit(index, placement, row_blocks, col_blocks, key_major)


def lists_both_ways(index: SparseIndex, placement: Placement) -> tuple[TileLists, TileLists]:
    """By query block and by key block; one and the same where it is Toeplitz, which serves both."""
    by_query = tile_lists(index, placement, key_major=False)
    return by_query, by_query if by_query.toeplitz else tile_lists(index, placement, key_major=True)


def _toeplitz(index: SparseIndex, placement: Placement, row_blocks: Tensor, col_blocks: Tensor) -> TileLists:
    assert placement.step is not None
    stride, offset = placement.step
    diagonals = index.diagonals.contiguous()
    heads, keys = diagonals.shape[0] * diagonals.shape[1], placement.k_blocks.numel()
    pitch = placement.q_blocks.numel() + keys  # one more than there are shifts
    entries = torch.empty(heads * pitch + 1, dtype=torch.int32, device=diagonals.device)
    bounds = torch.empty(heads, pitch, dtype=torch.int32, device=diagonals.device)
    launch(_toeplitz_kernel, (heads,))(
        diagonals.view(torch.int8),
        entries,
        bounds,
        index.num_blocks,
        pitch,
        keys,
        stride,
        offset,
        CHUNK=_CHUNK,
    )
    shift, rest = divmod(-offset, stride)
    diagonal = shift + keys - 1 if rest == 0 and 0 <= shift + keys - 1 < pitch - 1 else -1
    reach = _reach_of(index, placement)
    return TileLists(entries, bounds, row_blocks, col_blocks, diagonal, True, reach)


def _explicit(
    index: SparseIndex, placement: Placement, row_blocks: Tensor, col_blocks: Tensor, key_major: bool
) -> TileLists:
    heads, device = index.diagonals.shape[0] * index.diagonals.shape[1], index.diagonals.device
    rows, cols = row_blocks.numel(), col_blocks.numel()
    entries = torch.empty(heads * rows * cols + 1, dtype=torch.int32, device=device)
    bounds = torch.empty(heads, rows, dtype=torch.int32, device=device)
    lists = TileLists(entries, bounds, row_blocks, col_blocks, -1, False, _reach_of(index, placement))
    selected, row_bytes = bitmaps(index, placement.q_blocks)
    launch(_explicit_kernel, (heads * rows,))(
        selected, RowLists(entries, bounds, row_blocks, col_blocks, None), index.num_blocks, rows, cols, row_bytes,
        HAS_BLOCKS=row_bytes > 0, KEY_MAJOR=key_major, CHUNK=min(_CHUNK, triton.next_power_of_2(cols)),
    )  # fmt: skip
    return lists


@triton.jit(do_not_specialize=["num_blocks", "pitch", "keys", "stride", "offset"])
def _toeplitz_kernel(
    diagonals, entries, bounds, num_blocks, pitch, keys, stride, offset, CHUNK: tl.constexpr
):
    """One program a head: compact the diagonals that some local pair of blocks can have."""
    head = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, pitch - 1, CHUNK):
        u = start + tl.arange(0, CHUNK)
        distance = stride * (u - (keys - 1)) + offset
        inside = (u < pitch - 1) & (distance >= 0) & (distance < num_blocks)
        bit = tl.load(diagonals + head * num_blocks + distance, mask=inside, other=0).to(tl.int32)
        upto = count + tl.cumsum(bit, 0)
        tl.store(entries + head * pitch + upto - 1, u, mask=bit != 0)
        tl.store(bounds + head * pitch + u, upto - bit, mask=u < pitch - 1)
        count += tl.sum(bit, 0)
    tl.store(bounds + head * pitch + pitch - 1, count)


@triton.jit
def selected_tiles(
    selected: Bitmaps, num_blocks, row_bytes, row: Row, slot, other, there, cols, HAS_BLOCKS: tl.constexpr,
    KEY_MAJOR: tl.constexpr,
):  # fmt: skip
    """1 for each selected tile of a row of blocks, else 0: int32 like ``slot``.

    Args:
        slot, other: local and global numbers of the blocks to look at, of keys or, KEY_MAJOR, of queries.
        there: which of them exist.
    """
    query, key = (other, row.block) if KEY_MAJOR else (row.block, other)
    causal = there & (query >= key)
    if selected.first_blocks is not None:
        bounds = selected.first_blocks + row.head // selected.heads * num_blocks
        if KEY_MAJOR:
            first_block = tl.load(bounds + query, mask=causal, other=0)
        else:
            first_block = tl.load(bounds + query)
        causal = causal & (key >= first_block)
    diagonal = selected.diagonals + row.head * num_blocks + (query - key)
    bit = tl.load(diagonal, mask=causal, other=0).to(tl.int32)
    if HAS_BLOCKS:
        query_row = row.head * cols + slot if KEY_MAJOR else row.number
        byte = tl.load(selected.blocks + query_row * row_bytes + key // 8, mask=causal, other=0).to(tl.int32)
        bit |= (byte >> (key % 8)) & 1
    return bit


@triton.jit(do_not_specialize=["num_blocks", "rows", "cols", "row_bytes"])
def _explicit_kernel(
    selected: Bitmaps, lists: RowLists, num_blocks, rows, cols, row_bytes,
    HAS_BLOCKS: tl.constexpr, KEY_MAJOR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program a row of a head: compact its selected tiles, nearest first."""
    pid = tl.program_id(0).to(tl.int64)
    row = Row(pid, pid // rows, tl.load(lists.row_blocks + pid % rows))
    count = 0
    for start in range(0, cols, CHUNK):
        lane = start + tl.arange(0, CHUNK)
        there = lane < cols
        slot = lane if KEY_MAJOR else cols - 1 - lane
        other = tl.load(lists.col_blocks + slot, mask=there, other=0)
        bit = selected_tiles(
            selected, num_blocks, row_bytes, row, slot, other, there, cols, HAS_BLOCKS, KEY_MAJOR
        )
        upto = count + tl.cumsum(bit, 0)
        tl.store(lists.entries + pid * cols + upto - 1, slot, mask=bit != 0)
        count += tl.sum(bit, 0)
    tl.store(lists.bounds + pid, count)
