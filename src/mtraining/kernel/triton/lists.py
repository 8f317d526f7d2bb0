"""Row lists of slash tiles for the kernels, built on the device without a host synchronisation.

Two kinds, told apart by ``TileLists.toeplitz``:

* *Toeplitz*: local query and key blocks are arithmetic progressions of one step (any whole sequence, the striped
  and the contiguous layout), so a selected diagonal is the same shift ``i - j`` between local blocks in every row.
  One ascending list per head serves all rows in both directions; entry u stands for the shift u - (key blocks - 1).
  ``bounds`` counts the entries below each u, which gives every row its slice. O(blocks) memory a head.
* *explicit*: one list of local blocks per row (other layouts, indices with block masks), nearest block first.

In both kinds the tile on the causal diagonal, if selected, is the first of its row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtraining.kernel.index import SparseIndex
from mtraining.kernel.placement import Placement

_CHUNK = 1024


@dataclass(frozen=True)
class TileLists:
    """Lists of one direction.

    Attributes:
        entries: int32, with at least one spare element at the end (the kernels read one entry ahead).
        bounds: int32; Toeplitz: (batch * heads, rows + columns), entries below each shift; explicit: (batch * heads,
            rows), list lengths.
        row_blocks, col_blocks: int32, global block numbers.
        diagonal: Toeplitz: the entry of the causal diagonal, -1 where this call has none.
        toeplitz: which kind.
    """

    entries: Tensor
    bounds: Tensor
    row_blocks: Tensor
    col_blocks: Tensor
    diagonal: int
    toeplitz: bool


def tile_lists(index: SparseIndex, placement: Placement, key_major: bool) -> TileLists:
    """The selected tiles of each local query block (or, ``key_major``, of each visiting key block)."""
    row_blocks, col_blocks = placement.q_blocks.int(), placement.k_blocks.int()
    if key_major:
        row_blocks, col_blocks = col_blocks, row_blocks
    if placement.step is not None and index.blocks is None:
        return _toeplitz(index, placement, row_blocks, col_blocks)
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
    _toeplitz_kernel[(heads,)](
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
    return TileLists(entries, bounds, row_blocks, col_blocks, diagonal, True)


def _explicit(
    index: SparseIndex, placement: Placement, row_blocks: Tensor, col_blocks: Tensor, key_major: bool
) -> TileLists:
    diagonals = index.diagonals.contiguous()
    heads, rows, cols = diagonals.shape[0] * diagonals.shape[1], row_blocks.numel(), col_blocks.numel()
    entries = torch.empty(heads * rows * cols + 1, dtype=torch.int32, device=diagonals.device)
    bounds = torch.empty(heads, rows, dtype=torch.int32, device=diagonals.device)
    blocks = index.local_blocks(placement.q_blocks)
    _explicit_kernel[(heads * rows,)](
        diagonals.view(torch.int8), diagonals if blocks is None else blocks, row_blocks, col_blocks, entries, bounds,
        index.num_blocks, rows, cols, 0 if blocks is None else blocks.shape[-1],
        HAS_BLOCKS=blocks is not None, KEY_MAJOR=key_major, CHUNK=min(_CHUNK, triton.next_power_of_2(cols)),
    )  # fmt: skip
    return TileLists(entries, bounds, row_blocks, col_blocks, -1, False)


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
    diagonals, blocks, col_blocks, mine, slot, there, pid, head, cols, num_blocks, row_bytes, HAS_BLOCKS: tl.constexpr,
    KEY_MAJOR: tl.constexpr,
):  # fmt: skip
    """For row ``pid`` (global block ``mine`` of ``head``) and the local blocks ``slot``, where ``there``: 1 where the
    tile is selected, and the global numbers of those blocks."""
    other = tl.load(col_blocks + slot, mask=there, other=0)
    query, key = (other, mine) if KEY_MAJOR else (mine, other)
    causal = there & (query >= key)
    bit = tl.load(diagonals + head * num_blocks + (query - key), mask=causal, other=0).to(tl.int32)
    if HAS_BLOCKS:
        row = head * cols + slot if KEY_MAJOR else pid
        byte = tl.load(blocks + row * row_bytes + key // 8, mask=causal, other=0).to(tl.int32)
        bit |= (byte >> (key % 8)) & 1
    return bit, other


@triton.jit(do_not_specialize=["num_blocks", "rows", "cols", "row_bytes"])
def _explicit_kernel(
    diagonals, blocks, row_blocks, col_blocks, entries, bounds, num_blocks, rows, cols, row_bytes,
    HAS_BLOCKS: tl.constexpr, KEY_MAJOR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program a row of a head: compact its selected tiles, nearest first."""
    pid = tl.program_id(0).to(tl.int64)
    head = pid // rows
    mine = tl.load(row_blocks + pid % rows)
    count = 0
    for start in range(0, cols, CHUNK):
        lane = start + tl.arange(0, CHUNK)
        there = lane < cols
        slot = lane if KEY_MAJOR else cols - 1 - lane
        bit, _ = selected_tiles(
            diagonals,
            blocks,
            col_blocks,
            mine,
            slot,
            there,
            pid,
            head,
            cols,
            num_blocks,
            row_bytes,
            HAS_BLOCKS,
            KEY_MAJOR,
        )
        upto = count + tl.cumsum(bit, 0)
        tl.store(entries + pid * cols + upto - 1, slot, mask=bit != 0)
        count += tl.sum(bit, 0)
    tl.store(bounds + pid, count)
