"""Around a foreign attention kernel: block lists for it to read, and an exact merge of what it returns.

Both run on the device without a host synchronisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtraining.kernel.index import SparseIndex
from mtraining.kernel.placement import Placement
from mtraining.kernel.triton.common import (
    Strided,
    load_tile_rows,
    start_of_row,
    store_tile_rows,
    strided,
    tile_offsets,
)
from mtraining.kernel.triton.launch import launch
from mtraining.kernel.triton.lists import Bitmaps, Row, bitmaps, selected_tiles
from mtraining.kernel.triton.tile_sizes import padded

_CHUNK = 1024
_BLOCK_M = 32


class BlockLists(NamedTuple):
    """Selected tiles of each row of blocks, those that need a token mask apart; local block numbers, all int32.

    Masked are the tiles on the causal diagonal and, with starts, those that hold a key before a query's start.

    Attributes:
        full_counts: (batch, q_heads, rows).
        full: (batch, q_heads, rows, cols), the first ``full_counts`` entries of a row ascending, the rest not written.
        masked_counts: (batch, q_heads, rows), without starts 1 where the diagonal tile is selected, else 0.
        masked: (batch, q_heads, rows, 1 or, with starts, cols), like ``full``; without starts 0 where there is none.
    """

    full_counts: Tensor
    full: Tensor
    masked_counts: Tensor
    masked: Tensor


def block_lists(index: SparseIndex, placement: Placement, key_major: bool) -> BlockLists:
    """Key blocks of each local query block or, ``key_major``, query blocks of each visiting key block.

    Rows have room for every block, since the longest is not known on the host: 4 bytes for each pair of local blocks.
    """
    rows, cols = placement.q_blocks.int(), placement.k_blocks.int()
    if key_major:
        rows, cols = cols, rows
    shape, device = (*index.diagonals.shape[:2], rows.numel()), index.diagonals.device
    full = torch.empty(*shape, cols.numel(), dtype=torch.int32, device=device)
    full_from = None
    if index.starts is not None:
        last = index.starts[:, index.block_size - 1 :: index.block_size]
        full_from = (last + (index.block_size - 1)) // index.block_size
    most = 1 if full_from is None else cols.numel()
    masked = torch.empty(*shape, most, dtype=torch.int32, device=device)
    full_counts, masked_counts = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    lists = BlockLists(full_counts, full, masked_counts, masked)
    selected, row_bytes = bitmaps(index, placement.q_blocks)
    launch(_block_lists_kernel, (full_counts.numel(),))(
        selected, rows, cols, lists, full_from, index.num_blocks, rows.numel(), cols.numel(), row_bytes,
        HAS_BLOCKS=row_bytes > 0, KEY_MAJOR=key_major, CHUNK=min(_CHUNK, triton.next_power_of_2(cols.numel())),
    )  # fmt: skip
    return lists


def merge_partial(
    part: Tensor, part_lse: Tensor, out: Tensor | None, lse: Tensor | None, *, final: bool = False
) -> tuple[Tensor, Tensor]:
    """Merge a partial attention into a previous fp32 one, in place where there is one.

    Args:
        part: (batch, rows, q_heads, head_dim), any dtype; zero in rows that saw no key. NaN goes through, whatever
            lse says of it: flash-attn-4 has -inf for such rows.
        part_lse: fp32 (batch, q_heads, rows), contiguous.
        out, lse: the previous result, or None.
        final: the result is wanted in the dtype of ``part``, which is then written over.

    Returns:
        out fp32 or final (batch, rows, q_heads, head_dim), lse fp32 (batch, q_heads, rows).
    """
    if out is None or lse is None:
        return part if final else part.float(), part_lse
    out, lse = (out if out.stride(-1) == 1 else out.contiguous()), lse.contiguous()
    result = part if final else out
    batch, rows, heads, dim = part.shape
    launch(_merge_kernel, (triton.cdiv(rows, _BLOCK_M) * batch * heads,))(
        strided(part, fixed_row=False), part_lse, strided(out, fixed_row=False), lse,
        strided(result, fixed_row=False), rows, heads, HEAD_DIM=dim, BLOCK_D=padded(dim), BLOCK_M=_BLOCK_M,
    )  # fmt: skip
    return result, lse


@triton.jit(do_not_specialize=["num_blocks", "rows", "cols", "row_bytes"])
def _block_lists_kernel(
    selected: Bitmaps, row_blocks, col_blocks, lists: BlockLists, full_from, num_blocks, rows, cols, row_bytes,
    HAS_BLOCKS: tl.constexpr, KEY_MAJOR: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program a row of a head.

    ``full_from`` int32 (batch, num_blocks), the first key block that all queries of a block may attend to throughout;
    None without starts.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = Row(pid, pid // rows, tl.load(row_blocks + pid % rows))
    count = 0
    mask_count = 0
    own_slot = 0
    for start in range(0, cols, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        there = slot < cols
        other = tl.load(col_blocks + slot, mask=there, other=0)
        bit = selected_tiles(
            selected, num_blocks, row_bytes, row, slot, other, there, cols, HAS_BLOCKS, KEY_MAJOR
        )
        if full_from is None:
            mask_bit = tl.where(other == row.block, bit, 0)
            own_slot += tl.sum(mask_bit * slot, 0)
        else:
            query, key = (other, row.block) if KEY_MAJOR else (row.block, other)
            bounds = full_from + row.head // selected.heads * num_blocks
            if KEY_MAJOR:
                full = key >= tl.load(bounds + query, mask=there, other=0)
            else:
                full = key >= tl.load(bounds + query)
            mask_bit = tl.where((other == row.block) | ~full, bit, 0)
            place = mask_count + tl.cumsum(mask_bit, 0)
            tl.store(lists.masked + pid * cols + place - 1, slot, mask=mask_bit != 0)
        mask_count += tl.sum(mask_bit, 0)
        bit -= mask_bit
        upto = count + tl.cumsum(bit, 0)
        tl.store(lists.full + pid * cols + upto - 1, slot, mask=bit != 0)
        count += tl.sum(bit, 0)
    tl.store(lists.full_counts + pid, count)
    tl.store(lists.masked_counts + pid, mask_count)
    if full_from is None:
        tl.store(lists.masked + pid, own_slot)


@triton.jit(do_not_specialize=["rows", "heads"])
def _merge_kernel(
    part: Strided, part_lse_ptr, out: Strided, lse_ptr, to: Strided, rows, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program for a few rows of a head; heads side by side read whole lines."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    head = (pid % heads).to(tl.int64)
    tile = (pid // heads) % tiles
    batch = (pid // heads // tiles).to(tl.int64)
    first, left = tile.to(tl.int64) * BLOCK_M, rows - tile * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    at_lse = (batch * heads + head) * rows + first + lane
    at_out = start_of_row(out, batch, head, first)
    at_part = start_of_row(part, batch, head, first)
    new_lse = tl.load(part_lse_ptr + at_lse, mask=lane < left, other=float("-inf"))
    old_lse = tl.load(lse_ptr + at_lse, mask=lane < left, other=float("-inf"))
    part_offsets = tile_offsets(part.row, BLOCK_M, BLOCK_D)
    # [BLOCK_M, BLOCK_D]
    new = load_tile_rows(at_part, part_offsets, left, HEAD_DIM, BLOCK_D).to(tl.float32)
    out_offsets = tile_offsets(out.row, BLOCK_M, BLOCK_D)
    old = load_tile_rows(at_out, out_offsets, left, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    top = tl.maximum(new_lse, old_lse)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(new_lse - safe)
    old_weight = tl.exp(old_lse - safe)
    total = weight + old_weight
    divisor = tl.where(total == 0.0, 1.0, total)
    merged = new * (weight / divisor)[:, None] + old * (old_weight / divisor)[:, None]
    lse = tl.where(total == 0.0, float("-inf"), safe + tl.log(divisor))
    # What is written stands where other warps read: each loads the lse of its own rows, one stores them all.
    tl.debug_barrier()
    at_to = start_of_row(to, batch, head, first)
    to_offsets = tile_offsets(to.row, BLOCK_M, BLOCK_D)
    store_tile_rows(at_to, to_offsets, merged.to(to.ptr.dtype.element_ty), left, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + at_lse, lse, mask=lane < left)
