"""delta = rowsum(dout * out), which every backward kernel subtracts."""

from __future__ import annotations

import triton
import triton.language as tl

from mtraining.kernel.triton.common import load_tile_rows, tile_offsets


@triton.jit(do_not_specialize=["rows", "heads"])
def row_delta_kernel(
    out_ptr, do_ptr, delta_ptr, o_b, o_r, o_h, do_b, do_r, do_h, rows, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(batch, heads, rows) from (batch, rows, heads, head_dim) tensors; heads side by side read whole lines."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(rows, BLOCK_M)
    head = (pid % heads).to(tl.int64)
    tile = (pid // heads) % tiles
    batch = (pid // heads // tiles).to(tl.int64)
    first = tile.to(tl.int64) * BLOCK_M
    out_base = out_ptr + batch * o_b + head * o_h + first * o_r
    do_base = do_ptr + batch * do_b + head * do_h + first * do_r
    left = rows - tile * BLOCK_M
    out = load_tile_rows(out_base, tile_offsets(o_r, BLOCK_M, BLOCK_D), left, HEAD_DIM, BLOCK_D)
    dout = load_tile_rows(do_base, tile_offsets(do_r, BLOCK_M, BLOCK_D), left, HEAD_DIM, BLOCK_D)
    lane = tl.arange(0, BLOCK_M)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + (batch * heads + head) * rows + first + lane, delta, mask=lane < left)
