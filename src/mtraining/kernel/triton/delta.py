"""delta = rowsum(dout * out), which every backward kernel subtracts."""

from __future__ import annotations

import triton
import triton.language as tl

from mtraining.kernel.triton.common import Strided, load_tile_rows, start_of_row, tile_offsets


@triton.jit(do_not_specialize=["rows", "heads"])
def row_delta_kernel(
    out: Strided, dout: Strided, delta_ptr, rows, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(batch, heads, rows) from (batch, rows, heads, head_dim) tensors; heads side by side read whole lines."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    head = (pid % heads).to(tl.int64)
    tile = (pid // heads) % tiles
    batch = (pid // heads // tiles).to(tl.int64)
    first = tile.to(tl.int64) * BLOCK_M
    out_base = start_of_row(out, batch, head, first)
    do_base = start_of_row(dout, batch, head, first)
    left = rows - tile * BLOCK_M
    # [BLOCK_M, BLOCK_D]
    values = load_tile_rows(out_base, tile_offsets(out.row, BLOCK_M, BLOCK_D), left, HEAD_DIM, BLOCK_D)
    grads = load_tile_rows(do_base, tile_offsets(dout.row, BLOCK_M, BLOCK_D), left, HEAD_DIM, BLOCK_D)
    lane = tl.arange(0, BLOCK_M)
    delta = tl.sum(values.to(tl.float32) * grads.to(tl.float32), 1)  # [BLOCK_M]
    tl.store(delta_ptr + (batch * heads + head) * rows + first + lane, delta, mask=lane < left)
