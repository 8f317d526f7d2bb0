"""Columns: dense tiles of compact keys over a causal prefix; forward, query-major dQ and key-major dK/dV.

The columns of a head are sorted, so the queries of a block see a prefix of them. What a block of queries must not
see within the prefix, whole tokens at a time, is one bit a column: columns inside a slash tile of the block (they
belong to that tile) and columns after the block. The bits are computed once a call (triton/hidden.py) and read as one
number a tile. What is left is the causal mask inside the block itself, for the last tile or two.

``before`` and ``upto`` (batch, heads, query blocks) count the columns before a block and those up to the last it sees.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtraining.kernel.triton.common import (
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
def _load_keys(base, offsets, present, EVEN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of compact keys; EVEN: the capacity is a whole number of tiles."""
    if EVEN:
        tile = load_tile(base, offsets, HEAD_DIM, BLOCK_D)
    else:
        tile = load_tile_rows(base, offsets, present, HEAD_DIM, BLOCK_D)
    return tile


@triton.jit
def _hidden(words, BLOCK_N: tl.constexpr):
    """Bits of a tile of columns, from BLOCK_N // 32 numbers that stand side by side."""
    lane = tl.arange(0, BLOCK_N)
    word = tl.load(words)
    for j in tl.static_range(1, BLOCK_N // 32):
        word = tl.where(lane >= 32 * j, tl.load(words + j), word)
    return ((word >> (lane % 32)) & 1) != 0


@triton.jit
def _query_program(rows, heads, SUBTILES: tl.constexpr):
    """Which (batch, head, block, tile in it) this program owns: last rows, the longest, first."""
    pid = tl.program_id(0)
    tiles = rows * SUBTILES
    tile = tiles - 1 - pid % tiles
    head = (pid // tiles) % heads
    return (pid // tiles // heads).to(tl.int64), head.to(tl.int64), tile // SUBTILES, tile % SUBTILES


@triton.jit(do_not_specialize=["heads", "rows", "capacity", "num_blocks", "words_row"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, columns_ptr, words_ptr, q_blocks, before_ptr, upto_ptr,
    q_b, q_r: tl.constexpr, q_h, k_b, k_r: tl.constexpr, k_h, v_b, v_r: tl.constexpr, v_h,
    o_b, o_r: tl.constexpr, o_h,
    scale, heads, rows, capacity, num_blocks, words_row,
    HAS_PREV: tl.constexpr, EVEN: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
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
    words = words_ptr + (bh * rows + i) * words_row

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

    for t in range(0, tl.cdiv(upto, BLOCK_N)):
        start = tl.cast(t, tl.int64) * BLOCK_N
        present = capacity - t * BLOCK_N
        k = _load_keys(k_base + start * k_r, k_offsets, present, EVEN, HEAD_DIM, BLOCK_D)
        v = _load_keys(v_base + start * v_r, v_offsets, present, EVEN, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        hidden = _hidden(words + t * (BLOCK_N // 32), BLOCK_N)
        scores = tl.where(hidden[None, :], float("-inf"), scores)
        if t >= whole:
            at = _load_columns(columns, t * BLOCK_N, capacity, num_blocks * SIZE, BLOCK_N)
            position = block * SIZE + part * BLOCK_M + tl.arange(0, BLOCK_M)
            scores = tl.where(at[None, :] > position[:, None], float("-inf"), scores)
        acc, top, total = softmax_step(acc, top, total, scores, v, scale_log2, True, PRECISION)

    store_partial(out_base, out_offsets, lse_rows, acc, top, total, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["heads", "rows", "capacity", "num_blocks", "words_row"])
def query_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, columns_ptr, words_ptr, q_blocks, before_ptr, upto_ptr,
    do_b, do_r: tl.constexpr, do_h, q_b, q_r: tl.constexpr, q_h, k_b, k_r: tl.constexpr, k_h,
    v_b, v_r: tl.constexpr, v_h,
    dq_b, dq_r: tl.constexpr, dq_h,
    scale, heads, rows, capacity, num_blocks, words_row,
    ADD: tl.constexpr, EVEN: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, added to what is there if ADD, over its columns."""
    batch, head, i, part = _query_program(rows, heads, SIZE // BLOCK_M)
    bh = batch * heads + head
    upto = tl.load(upto_ptr + bh * rows + i)
    if ADD and upto == 0:
        return
    whole = tl.load(before_ptr + bh * rows + i) // BLOCK_N
    block = tl.load(q_blocks + i)
    columns = columns_ptr + bh * capacity
    words = words_ptr + (bh * rows + i) * words_row

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

    for t in range(0, tl.cdiv(upto, BLOCK_N)):
        start = tl.cast(t, tl.int64) * BLOCK_N
        present = capacity - t * BLOCK_N
        k = _load_keys(k_base + start * k_r, k_offsets, present, EVEN, HEAD_DIM, BLOCK_D)
        v = _load_keys(v_base + start * v_r, v_offsets, present, EVEN, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        hidden = _hidden(words + t * (BLOCK_N // 32), BLOCK_N)
        scores = tl.where(hidden[None, :], float("-inf"), scores)
        if t >= whole:
            at = _load_columns(columns, t * BLOCK_N, capacity, num_blocks * SIZE, BLOCK_N)
            position = block * SIZE + part * BLOCK_M + tl.arange(0, BLOCK_M)
            scores = tl.where(at[None, :] > position[:, None], float("-inf"), scores)
        dq = query_gradient_step(dq, scores, dout, k, v, lse2, delta, scale_log2, PRECISION)

    dq_offsets = tile_offsets(dq_r, BLOCK_M, BLOCK_D)
    dq = dq * scale
    if ADD:
        dq += load_tile(dq_base, dq_offsets, HEAD_DIM, BLOCK_D)
    store_tile(dq_base, dq_offsets, dq, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["batches", "heads", "rows", "capacity", "num_blocks", "words_row", "splits"])
def key_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, columns_ptr, words_ptr, q_blocks, first_slot,
    first_seen, do_b, do_r: tl.constexpr, do_h, q_b, q_r: tl.constexpr, q_h, k_b, k_r: tl.constexpr, k_h,
    v_b, v_r: tl.constexpr, v_h,
    dk_b, dk_r: tl.constexpr, dk_h,
    scale, batches, heads, rows, capacity, num_blocks, words_row, splits,
    EVEN: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of columns over one of ``splits`` equal shares of the queries that see it.

    ``first_slot``, ``first_seen``: see ``ColumnTables`` of triton/hidden.py.
    dk and dv are (splits, batch, capacity, heads, head_dim): the caller sums over the first axis.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(capacity, BLOCK_N)
    tile = pid % tiles
    split = (pid // tiles) % splits
    head = ((pid // tiles // splits) % heads).to(tl.int64)
    batch = (pid // tiles // splits // heads).to(tl.int64)
    bh = batch * heads + head

    first = tile.to(tl.int64) * BLOCK_N
    present = capacity - tile * BLOCK_N
    columns = columns_ptr + bh * capacity
    at = _load_columns(columns, tile * BLOCK_N, capacity, num_blocks * SIZE, BLOCK_N)
    last = tl.max(tl.where(at < num_blocks * SIZE, at, 0), 0) // SIZE
    lo = tl.min(
        tl.load(first_seen + bh * words_row + tile * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)), 0
    )
    masked_to = tl.load(first_slot + last + 1)
    share = tl.cdiv(rows - lo, splits)
    begin = lo + split * share
    end = tl.minimum(begin + share, rows)

    q_offsets = tile_offsets(q_r, BLOCK_M, BLOCK_D)
    do_offsets = tile_offsets(do_r, BLOCK_M, BLOCK_D)
    q_base = q_ptr + batch * q_b + head * q_h
    do_base = do_ptr + batch * do_b + head * do_h
    lse_base = lse_ptr + bh * rows * SIZE
    delta_base = delta_ptr + bh * rows * SIZE
    words = words_ptr + bh * rows * words_row + tile * (BLOCK_N // 32)
    k_base = k_ptr + batch * k_b + head * k_h + first * k_r
    v_base = v_ptr + batch * v_b + head * v_h + first * v_r
    lane = tl.arange(0, BLOCK_M)

    scale_log2 = scale * LOG2E
    k = _load_keys(k_base, tile_offsets(k_r, BLOCK_N, BLOCK_D), present, EVEN, HEAD_DIM, BLOCK_D)
    v = _load_keys(v_base, tile_offsets(v_r, BLOCK_N, BLOCK_D), present, EVEN, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    SUB: tl.constexpr = SIZE // BLOCK_M

    for t in range(begin * SUB, end * SUB):
        i = tl.cast(t // SUB, tl.int64)
        row = i * SIZE + (t % SUB) * BLOCK_M
        q = load_tile(q_base + row * q_r, q_offsets, HEAD_DIM, BLOCK_D)
        dout = load_tile(do_base + row * do_r, do_offsets, HEAD_DIM, BLOCK_D)
        lse2 = load_lse2(lse_base + row + lane)
        delta = tl.load(delta_base + row + lane)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        hidden = _hidden(words + i * words_row, BLOCK_N)
        scores = tl.where(hidden[:, None], float("-inf"), scores)
        if i < masked_to:
            key = _load_columns(columns, tile * BLOCK_N, capacity, num_blocks * SIZE, BLOCK_N)
            position = tl.load(q_blocks + i) * SIZE + (t % SUB) * BLOCK_M + lane
            scores = tl.where(key[:, None] > position[None, :], float("-inf"), scores)
        dk, dv = key_gradient_step(dk, dv, scores, v, q, dout, lse2, delta, scale_log2, PRECISION)

    to = (split * batches + batch) * dk_b + head * dk_h + first * dk_r
    offsets = tile_offsets(dk_r, BLOCK_N, BLOCK_D)
    store_tile_rows(dk_ptr + to, offsets, dk * scale, present, HEAD_DIM, BLOCK_D)
    store_tile_rows(dv_ptr + to, offsets, dv, present, HEAD_DIM, BLOCK_D)
