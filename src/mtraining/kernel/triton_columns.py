"""Columns: dense tiles of compact keys over a causal prefix; forward, query-major dQ and key-major dK/dV.

The columns of a head are sorted, so the queries of block g see a prefix of them: those before token g * size
wholly, and those inside the block up to the row. ``before`` and ``upto`` count both for every local query block.
A column inside a slash tile of the row's block belongs to that tile and is hidden here: one small load a tile of
columns, issued an iteration ahead of its use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtraining.kernel.triton_common import (
    LOG2E,
    key_gradient_step,
    load_lse2,
    load_partial,
    load_tile,
    load_tile_rows,
    query_gradient_step,
    softmax_step,
    store_partial,
    store_tile,
    store_tile_rows,
    tile_offsets,
)


@triton.jit
def _load_columns(columns, first, capacity, seq_len, BLOCK_N: tl.constexpr):
    at = first + tl.arange(0, BLOCK_N)
    return tl.load(columns + at, mask=at < capacity, other=seq_len)


@triton.jit
def _owned(diagonals, blocks, block, columns, num_blocks, HAS_BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """Nonzero where a slash tile of query block ``block`` holds the column; columns after the block are not."""
    distance = block - columns // SIZE
    bit = tl.load(diagonals + distance, mask=distance >= 0, other=0)
    if HAS_BLOCKS:
        row = blocks + block.to(tl.int64) * num_blocks
        bit |= tl.load(row + columns // SIZE, mask=distance >= 0, other=0)
    return bit


@triton.jit
def _query_program(rows, heads, SUBTILES: tl.constexpr):
    pid = tl.program_id(0)
    tiles = rows * SUBTILES
    tile = tiles - 1 - pid % tiles
    head = (pid // tiles) % heads
    return (pid // tiles // heads).to(tl.int64), head.to(tl.int64), tile // SUBTILES, tile % SUBTILES


@triton.jit(do_not_specialize=["heads", "rows", "capacity", "num_blocks"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, columns_ptr, diagonals_ptr, blocks_ptr, q_blocks, before_ptr, upto_ptr,
    q_b, q_r, q_h, k_b, k_r, k_h, v_b, v_r, v_h, o_b, o_r, o_h,
    scale, heads, rows, capacity, num_blocks,
    HAS_PREV: tl.constexpr, HAS_BLOCKS: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(out, lse) of one tile of queries over its columns, merged with what is already there if HAS_PREV."""
    batch, head, i, part = _query_program(rows, heads, SIZE // BLOCK_M)
    bh = batch * heads + head
    upto = tl.load(upto_ptr + bh * rows + i)
    if HAS_PREV and upto == 0:
        return
    whole = tl.load(before_ptr + bh * rows + i) // BLOCK_N
    block = tl.load(q_blocks + i)
    columns = columns_ptr + bh * capacity
    diagonals = diagonals_ptr + bh * num_blocks
    blocks = blocks_ptr + bh * num_blocks * num_blocks
    seq_len = num_blocks * SIZE

    first_row = i.to(tl.int64) * SIZE + part * BLOCK_M
    q_base = q_ptr + batch * q_b + head * q_h + first_row * q_r
    out_base = out_ptr + batch * o_b + head * o_h + first_row * o_r
    out_offsets = tile_offsets(o_r, BLOCK_M, BLOCK_D)
    lse_rows = lse_ptr + bh * rows * SIZE + first_row + tl.arange(0, BLOCK_M)
    k_base = k_ptr + batch * k_b + head * k_h
    v_base = v_ptr + batch * v_b + head * v_h
    k_offsets = tile_offsets(k_r, BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(v_r, BLOCK_N, BLOCK_D)

    scale_log2 = scale * LOG2E
    q = load_tile(q_base, tile_offsets(q_r, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)
    acc, top, total = load_partial(out_base, out_offsets, lse_rows, HAS_PREV, BLOCK_M, HEAD_DIM, BLOCK_D)

    at = _load_columns(columns, 0, capacity, seq_len, BLOCK_N)
    owned = _owned(diagonals, blocks, block, at, num_blocks, HAS_BLOCKS, SIZE)
    at = _load_columns(columns, BLOCK_N, capacity, seq_len, BLOCK_N)
    for t in range(0, whole):
        start = tl.cast(t, tl.int64) * BLOCK_N
        hidden = owned != 0
        owned = _owned(diagonals, blocks, block, at, num_blocks, HAS_BLOCKS, SIZE)
        at = _load_columns(columns, (t + 2) * BLOCK_N, capacity, seq_len, BLOCK_N)
        k = load_tile(k_base + start * k_r, k_offsets, HEAD_DIM, BLOCK_D)
        v = load_tile(v_base + start * v_r, v_offsets, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where(hidden[None, :], float("-inf"), scores)
        acc, top, total = softmax_step(acc, top, total, scores, v, scale_log2, True, PRECISION)

    position = block * SIZE + part * BLOCK_M + tl.arange(0, BLOCK_M)
    for t in range(whole, tl.cdiv(upto, BLOCK_N)):
        start = tl.cast(t, tl.int64) * BLOCK_N
        at = _load_columns(columns, t * BLOCK_N, capacity, seq_len, BLOCK_N)
        owned = _owned(diagonals, blocks, block, at, num_blocks, HAS_BLOCKS, SIZE)
        k = load_tile_rows(k_base + start * k_r, k_offsets, capacity - t * BLOCK_N, HEAD_DIM, BLOCK_D)
        v = load_tile_rows(v_base + start * v_r, v_offsets, capacity - t * BLOCK_N, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        hidden = (owned != 0)[None, :] | (at[None, :] > position[:, None])
        scores = tl.where(hidden, float("-inf"), scores)
        acc, top, total = softmax_step(acc, top, total, scores, v, scale_log2, True, PRECISION)

    store_partial(out_base, out_offsets, lse_rows, acc, top, total, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["heads", "rows", "capacity", "num_blocks"])
def query_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, columns_ptr, diagonals_ptr, blocks_ptr, q_blocks,
    before_ptr, upto_ptr,
    do_b, do_r, do_h, q_b, q_r, q_h, k_b, k_r, k_h, v_b, v_r, v_h, dq_b, dq_r, dq_h,
    scale, heads, rows, capacity, num_blocks,
    HAS_BLOCKS: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dq the gradient of one tile of queries over its columns."""
    batch, head, i, part = _query_program(rows, heads, SIZE // BLOCK_M)
    bh = batch * heads + head
    upto = tl.load(upto_ptr + bh * rows + i)
    if upto == 0:
        return
    whole = tl.load(before_ptr + bh * rows + i) // BLOCK_N
    block = tl.load(q_blocks + i)
    columns = columns_ptr + bh * capacity
    diagonals = diagonals_ptr + bh * num_blocks
    blocks = blocks_ptr + bh * num_blocks * num_blocks
    seq_len = num_blocks * SIZE

    first_row = i.to(tl.int64) * SIZE + part * BLOCK_M
    q_base = q_ptr + batch * q_b + head * q_h + first_row * q_r
    do_base = do_ptr + batch * do_b + head * do_h + first_row * do_r
    dq_base = dq_ptr + batch * dq_b + head * dq_h + first_row * dq_r
    stat_rows = bh * rows * SIZE + first_row + tl.arange(0, BLOCK_M)
    k_base = k_ptr + batch * k_b + head * k_h
    v_base = v_ptr + batch * v_b + head * v_h
    k_offsets = tile_offsets(k_r, BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(v_r, BLOCK_N, BLOCK_D)

    scale_log2 = scale * LOG2E
    q = load_tile(q_base, tile_offsets(q_r, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)
    dout = load_tile(do_base, tile_offsets(do_r, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)
    lse2 = load_lse2(lse_ptr + stat_rows)
    delta = tl.load(delta_ptr + stat_rows)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    at = _load_columns(columns, 0, capacity, seq_len, BLOCK_N)
    owned = _owned(diagonals, blocks, block, at, num_blocks, HAS_BLOCKS, SIZE)
    at = _load_columns(columns, BLOCK_N, capacity, seq_len, BLOCK_N)
    for t in range(0, whole):
        start = tl.cast(t, tl.int64) * BLOCK_N
        hidden = (owned != 0)[None, :]
        owned = _owned(diagonals, blocks, block, at, num_blocks, HAS_BLOCKS, SIZE)
        at = _load_columns(columns, (t + 2) * BLOCK_N, capacity, seq_len, BLOCK_N)
        k = load_tile(k_base + start * k_r, k_offsets, HEAD_DIM, BLOCK_D)
        v = load_tile(v_base + start * v_r, v_offsets, HEAD_DIM, BLOCK_D)
        dq = query_gradient_step(dq, q, dout, k, v, lse2, delta, hidden, scale_log2, True, PRECISION)

    position = block * SIZE + part * BLOCK_M + tl.arange(0, BLOCK_M)
    for t in range(whole, tl.cdiv(upto, BLOCK_N)):
        start = tl.cast(t, tl.int64) * BLOCK_N
        at = _load_columns(columns, t * BLOCK_N, capacity, seq_len, BLOCK_N)
        owned = _owned(diagonals, blocks, block, at, num_blocks, HAS_BLOCKS, SIZE)
        k = load_tile_rows(k_base + start * k_r, k_offsets, capacity - t * BLOCK_N, HEAD_DIM, BLOCK_D)
        v = load_tile_rows(v_base + start * v_r, v_offsets, capacity - t * BLOCK_N, HEAD_DIM, BLOCK_D)
        hidden = (owned != 0)[None, :] | (at[None, :] > position[:, None])
        dq = query_gradient_step(dq, q, dout, k, v, lse2, delta, hidden, scale_log2, True, PRECISION)

    dq_offsets = tile_offsets(dq_r, BLOCK_M, BLOCK_D)
    earlier = load_tile(dq_base, dq_offsets, HEAD_DIM, BLOCK_D)
    store_tile(dq_base, dq_offsets, earlier + dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["batches", "heads", "rows", "capacity", "num_blocks", "splits"])
def key_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, columns_ptr, diagonals_ptr, blocks_ptr, q_blocks,
    first_slot,
    do_b, do_r, do_h, q_b, q_r, q_h, k_b, k_r, k_h, v_b, v_r, v_h, dk_b, dk_r, dk_h,
    scale, batches, heads, rows, capacity, num_blocks, splits,
    HAS_BLOCKS: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of columns over one of ``splits`` equal shares of the queries that see it.

    ``first_slot`` (num_blocks + 1,): the first local query block whose global number is at least the given one.
    dk and dv are (splits, batch, capacity, heads, head_dim): the caller sums over the first axis.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(capacity, BLOCK_N)
    tile = pid % tiles
    split = (pid // tiles) % splits
    head = ((pid // tiles // splits) % heads).to(tl.int64)
    batch = (pid // tiles // splits // heads).to(tl.int64)
    bh = batch * heads + head
    seq_len = num_blocks * SIZE
    diagonals = diagonals_ptr + bh * num_blocks
    blocks = blocks_ptr + bh * num_blocks * num_blocks

    first = tile.to(tl.int64) * BLOCK_N
    present = capacity - tile * BLOCK_N
    at = _load_columns(columns_ptr + bh * capacity, tile * BLOCK_N, capacity, seq_len, BLOCK_N)
    lo = tl.load(first_slot + tl.min(at, 0) // SIZE)
    masked_to = tl.load(first_slot + tl.minimum(tl.max(at, 0) // SIZE + 1, num_blocks))
    share = tl.cdiv(rows - lo, splits)
    begin = lo + split * share
    end = tl.minimum(begin + share, rows)
    middle = tl.minimum(tl.maximum(masked_to, begin), end)

    q_offsets = tile_offsets(q_r, BLOCK_M, BLOCK_D)
    do_offsets = tile_offsets(do_r, BLOCK_M, BLOCK_D)
    q_base = q_ptr + batch * q_b + head * q_h
    do_base = do_ptr + batch * do_b + head * do_h
    lse_base = lse_ptr + bh * rows * SIZE
    delta_base = delta_ptr + bh * rows * SIZE
    lane = tl.arange(0, BLOCK_M)

    scale_log2 = scale * LOG2E
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    SUB: tl.constexpr = SIZE // BLOCK_M
    if begin < end:
        k_base = k_ptr + batch * k_b + head * k_h + first * k_r
        v_base = v_ptr + batch * v_b + head * v_h + first * v_r
        k = load_tile_rows(k_base, tile_offsets(k_r, BLOCK_N, BLOCK_D), present, HEAD_DIM, BLOCK_D)
        v = load_tile_rows(v_base, tile_offsets(v_r, BLOCK_N, BLOCK_D), present, HEAD_DIM, BLOCK_D)

        for t in range(begin * SUB, middle * SUB):
            row = tl.cast(t // SUB, tl.int64) * SIZE + (t % SUB) * BLOCK_M
            block = tl.load(q_blocks + t // SUB)
            q = load_tile(q_base + row * q_r, q_offsets, HEAD_DIM, BLOCK_D)
            dout = load_tile(do_base + row * do_r, do_offsets, HEAD_DIM, BLOCK_D)
            lse2 = load_lse2(lse_base + row + lane)
            delta = tl.load(delta_base + row + lane)
            owned = _owned(diagonals, blocks, block, at, num_blocks, HAS_BLOCKS, SIZE)
            position = block * SIZE + (t % SUB) * BLOCK_M + lane
            hidden = (owned != 0)[:, None] | (at[:, None] > position[None, :])
            dk, dv = key_gradient_step(
                dk, dv, k, v, q, dout, lse2, delta, hidden, scale_log2, True, PRECISION
            )

        last = rows - 1
        block = tl.load(q_blocks + tl.minimum(middle, last))
        owned = _owned(diagonals, blocks, block, at, num_blocks, HAS_BLOCKS, SIZE)
        block = tl.load(q_blocks + tl.minimum((middle * SUB + 1) // SUB, last))
        for t in range(middle * SUB, end * SUB):
            row = tl.cast(t // SUB, tl.int64) * SIZE + (t % SUB) * BLOCK_M
            hidden = (owned != 0)[:, None]
            owned = _owned(diagonals, blocks, block, at, num_blocks, HAS_BLOCKS, SIZE)
            block = tl.load(q_blocks + tl.minimum((t + 2) // SUB, last))
            q = load_tile(q_base + row * q_r, q_offsets, HEAD_DIM, BLOCK_D)
            dout = load_tile(do_base + row * do_r, do_offsets, HEAD_DIM, BLOCK_D)
            lse2 = load_lse2(lse_base + row + lane)
            delta = tl.load(delta_base + row + lane)
            dk, dv = key_gradient_step(
                dk, dv, k, v, q, dout, lse2, delta, hidden, scale_log2, True, PRECISION
            )

    to = (split * batches + batch) * dk_b + head * dk_h + first * dk_r
    offsets = tile_offsets(dk_r, BLOCK_N, BLOCK_D)
    store_tile_rows(dk_ptr + to, offsets, dk * scale, present, HEAD_DIM, BLOCK_D)
    store_tile_rows(dv_ptr + to, offsets, dv, present, HEAD_DIM, BLOCK_D)
