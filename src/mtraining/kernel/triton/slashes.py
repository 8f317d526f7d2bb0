"""Slash tiles: forward, query-major dQ and key-major dK/dV. No atomics, every sum in a fixed order.

One program owns one tile of rows (or keys) of one head and walks its list (triton/lists.py). The tile on the causal
diagonal comes last and is the only one that needs a token mask. Programs of one head stand together, neighbouring rows
side by side and longer rows first: they walk the same list at the same pace, so what one row reads through one
diagonal its neighbours read soon after through the next, from L2. (Heads of a group side by side share less, for their
lists differ: forward at 512K, 103 blocks a row, took 147 ms in that order and 124 ms in this one.)
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
    query_gradient_step,
    softmax_step,
    store_partial,
    store_tile,
    tile_offsets,
    tile_place,
    tile_row,
    tile_slot,
)


@triton.jit
def _query_program(n_rows, kv_heads, GROUP: tl.constexpr, SUBTILES: tl.constexpr):
    """Which (batch, query head, kv head, block, tile in it) this program owns: last rows, the longest, first."""
    pid = tl.program_id(0)
    tiles = n_rows * SUBTILES
    tile = tiles - 1 - pid % tiles
    head = (pid // tiles) % (kv_heads * GROUP)
    batch = pid // tiles // (kv_heads * GROUP)
    return (
        batch.to(tl.int64),
        head.to(tl.int64),
        (head // GROUP).to(tl.int64),
        tile // SUBTILES,
        tile % SUBTILES,
    )


@triton.jit
def _visited_tile(
    source, base, offsets, batch, start, kv_head, stride, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK keys (or values) from local row ``start``; ``source`` is their tensor descriptor if TMA, else unused."""
    if TMA:
        tile = source.load([batch.to(tl.int32), start.to(tl.int32), kv_head.to(tl.int32), 0]).reshape(
            BLOCK, BLOCK_D
        )
    else:
        tile = load_tile(base + start * stride, offsets, HEAD_DIM, BLOCK_D)
    return tile


@triton.jit(do_not_specialize=["kv_heads", "n_rows", "n_cols", "diagonal"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, k_source, v_source, out_ptr, lse_ptr, entries, bounds, row_blocks, col_blocks,
    q_b, q_r: tl.constexpr, q_h, k_b, k_r: tl.constexpr, k_h, v_b, v_r: tl.constexpr, v_h,
    o_b, o_r: tl.constexpr, o_h,
    scale, kv_heads, n_rows, n_cols, diagonal,
    HAS_PREV: tl.constexpr, TOEPLITZ: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """(out, lse) of one tile of queries, merged with what is already there if HAS_PREV."""
    batch, head, kv_head, i, part = _query_program(n_rows, kv_heads, GROUP, SIZE // BLOCK_M)
    bh = batch * kv_heads * GROUP + head
    row, lo, hi, origin, own = tile_row(
        entries, bounds, row_blocks, col_blocks, bh, i, n_rows, n_cols, diagonal, TOEPLITZ, False
    )
    if HAS_PREV and hi == lo:
        return
    first_row = i.to(tl.int64) * SIZE + part * BLOCK_M
    q_base = q_ptr + batch * q_b + head * q_h + first_row * q_r
    out_base = out_ptr + batch * o_b + head * o_h + first_row * o_r
    out_offsets = tile_offsets(o_r, BLOCK_M, BLOCK_D)
    lse_rows = lse_ptr + bh * n_rows * SIZE + first_row + tl.arange(0, BLOCK_M)
    k_base = k_ptr + batch * k_b + kv_head * k_h
    v_base = v_ptr + batch * v_b + kv_head * v_h
    k_offsets = tile_offsets(k_r, BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(v_r, BLOCK_N, BLOCK_D)

    scale_log2 = scale * LOG2E
    q = load_tile(q_base, tile_offsets(q_r, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)
    acc, top, total = load_partial(out_base, out_offsets, lse_rows, HAS_PREV, BLOCK_M, HEAD_DIM, BLOCK_D)
    SUB: tl.constexpr = SIZE // BLOCK_N

    free = (hi - lo - own) * SUB  # the tile on the diagonal comes last, and only as far as these queries see
    entry = tl.load(row + tile_place(0, lo, hi, own, SUB))  # one iteration ahead of its use
    for t in range(0, free + own * tl.cdiv((part + 1) * BLOCK_M, BLOCK_N)):
        start = tile_slot(entry, origin, TOEPLITZ, False) * SIZE + (t % SUB) * BLOCK_N
        entry = tl.load(row + tile_place(t + 1, lo, hi, own, SUB))
        k = _visited_tile(
            k_source, k_base, k_offsets, batch, start, kv_head, k_r, BLOCK_N, HEAD_DIM, BLOCK_D, TMA
        )
        v = _visited_tile(
            v_source, v_base, v_offsets, batch, start, kv_head, v_r, BLOCK_N, HEAD_DIM, BLOCK_D, TMA
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if t >= free:
            key = (t % SUB) * BLOCK_N + tl.arange(0, BLOCK_N)
            query = part * BLOCK_M + tl.arange(0, BLOCK_M)
            scores = tl.where(query[:, None] < key[None, :], float("-inf"), scores)
        # Every row sees the first key of a tile on the diagonal, so no row is still at -inf afterwards.
        acc, top, total = softmax_step(acc, top, total, scores, v, scale_log2, False, PRECISION)

    store_partial(out_base, out_offsets, lse_rows, acc, top, total, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["kv_heads", "n_rows", "n_cols", "diagonal"])
def query_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, entries, bounds, row_blocks, col_blocks,
    do_b, do_r: tl.constexpr, do_h, q_b, q_r: tl.constexpr, q_h, k_b, k_r: tl.constexpr, k_h,
    v_b, v_r: tl.constexpr, v_h, dq_b, dq_r: tl.constexpr, dq_h,
    scale, kv_heads, n_rows, n_cols, diagonal,
    ADD: tl.constexpr, TOEPLITZ: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, added to what is there if ADD, over its slash tiles."""
    batch, head, kv_head, i, part = _query_program(n_rows, kv_heads, GROUP, SIZE // BLOCK_M)
    bh = batch * kv_heads * GROUP + head
    row, lo, hi, origin, own = tile_row(
        entries, bounds, row_blocks, col_blocks, bh, i, n_rows, n_cols, diagonal, TOEPLITZ, False
    )
    if ADD and hi == lo:
        return
    first_row = i.to(tl.int64) * SIZE + part * BLOCK_M
    q_base = q_ptr + batch * q_b + head * q_h + first_row * q_r
    do_base = do_ptr + batch * do_b + head * do_h + first_row * do_r
    dq_base = dq_ptr + batch * dq_b + head * dq_h + first_row * dq_r
    stat_rows = bh * n_rows * SIZE + first_row + tl.arange(0, BLOCK_M)
    k_base = k_ptr + batch * k_b + kv_head * k_h
    v_base = v_ptr + batch * v_b + kv_head * v_h
    k_offsets = tile_offsets(k_r, BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(v_r, BLOCK_N, BLOCK_D)

    scale_log2 = scale * LOG2E
    q = load_tile(q_base, tile_offsets(q_r, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)
    dout = load_tile(do_base, tile_offsets(do_r, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)
    lse2 = load_lse2(lse_ptr + stat_rows)
    delta = tl.load(delta_ptr + stat_rows)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    SUB: tl.constexpr = SIZE // BLOCK_N

    free = (hi - lo - own) * SUB
    entry = tl.load(row + tile_place(0, lo, hi, own, SUB))
    for t in range(0, free + own * tl.cdiv((part + 1) * BLOCK_M, BLOCK_N)):
        start = tile_slot(entry, origin, TOEPLITZ, False) * SIZE + (t % SUB) * BLOCK_N
        entry = tl.load(row + tile_place(t + 1, lo, hi, own, SUB))
        k = load_tile(k_base + start * k_r, k_offsets, HEAD_DIM, BLOCK_D)
        v = load_tile(v_base + start * v_r, v_offsets, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if t >= free:
            key = (t % SUB) * BLOCK_N + tl.arange(0, BLOCK_N)
            query = part * BLOCK_M + tl.arange(0, BLOCK_M)
            scores = tl.where(query[:, None] < key[None, :], float("-inf"), scores)
        dq = query_gradient_step(dq, scores, dout, k, v, lse2, delta, scale_log2, PRECISION)

    dq_offsets = tile_offsets(dq_r, BLOCK_M, BLOCK_D)
    dq = dq * scale
    if ADD:
        dq += load_tile(dq_base, dq_offsets, HEAD_DIM, BLOCK_D)
    store_tile(dq_base, dq_offsets, dq, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["batches", "kv_heads", "n_rows", "n_cols", "diagonal"])
def key_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, entries, bounds, row_blocks, col_blocks,
    do_b, do_r: tl.constexpr, do_h, q_b, q_r: tl.constexpr, q_h, k_b, k_r: tl.constexpr, k_h,
    v_b, v_r: tl.constexpr, v_h, dk_b, dk_r: tl.constexpr, dk_h,
    scale, batches, kv_heads, n_rows, n_cols, diagonal,
    TOEPLITZ: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys from GROUP / SPLITS query heads of its group; rows are key blocks here.

    dk and dv are (SPLITS, batch, keys, kv_heads, head_dim): a caller with SPLITS > 1 sums over the first axis.
    """
    pid = tl.program_id(0)
    SUBTILES: tl.constexpr = SIZE // BLOCK_N
    HEADS: tl.constexpr = GROUP // SPLITS
    SUB: tl.constexpr = SIZE // BLOCK_M
    split = pid % SPLITS
    tile = (pid // SPLITS) % (
        n_rows * SUBTILES
    )  # first keys first: under causality they have the longest rows
    rest = pid // SPLITS // (n_rows * SUBTILES)
    kv_head = (rest % kv_heads).to(tl.int64)
    batch = (rest // kv_heads).to(tl.int64)
    j, part = tile // SUBTILES, tile % SUBTILES

    first_key = j.to(tl.int64) * SIZE + part * BLOCK_N
    k_base = k_ptr + batch * k_b + kv_head * k_h + first_key * k_r
    v_base = v_ptr + batch * v_b + kv_head * v_h + first_key * v_r
    q_offsets = tile_offsets(q_r, BLOCK_M, BLOCK_D)
    do_offsets = tile_offsets(do_r, BLOCK_M, BLOCK_D)
    lane = tl.arange(0, BLOCK_M)

    scale_log2 = scale * LOG2E
    k = load_tile(k_base, tile_offsets(k_r, BLOCK_N, BLOCK_D), HEAD_DIM, BLOCK_D)
    v = load_tile(v_base, tile_offsets(v_r, BLOCK_N, BLOCK_D), HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    for g in range(0, HEADS):
        head = kv_head * GROUP + split * HEADS + g
        bh = batch * kv_heads * GROUP + head
        row, lo, hi, origin, own = tile_row(
            entries, bounds, row_blocks, col_blocks, bh, j, n_rows, n_cols, diagonal, TOEPLITZ, True
        )
        q_base = q_ptr + batch * q_b + head * q_h
        do_base = do_ptr + batch * do_b + head * do_h
        lse_base = lse_ptr + bh * n_cols * SIZE
        delta_base = delta_ptr + bh * n_cols * SIZE

        # Queries before this tile of keys see nothing of the tile on the diagonal.
        skip = part * BLOCK_N // BLOCK_M
        free = (hi - lo - own) * SUB
        entry = tl.load(row + tile_place(0, lo, hi, own, SUB))
        for t in range(0, free + own * (SUB - skip)):
            sub = t % SUB + tl.where(t >= free, skip, 0)
            at = tile_slot(entry, origin, TOEPLITZ, True) * SIZE + sub * BLOCK_M
            entry = tl.load(row + tile_place(t + 1, lo, hi, own, SUB))
            q = load_tile(q_base + at * q_r, q_offsets, HEAD_DIM, BLOCK_D)
            dout = load_tile(do_base + at * do_r, do_offsets, HEAD_DIM, BLOCK_D)
            lse2 = load_lse2(lse_base + at + lane)
            delta = tl.load(delta_base + at + lane)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if t >= free:
                key = part * BLOCK_N + tl.arange(0, BLOCK_N)
                scores = tl.where(key[:, None] > (sub * BLOCK_M + lane)[None, :], float("-inf"), scores)
            dk, dv = key_gradient_step(dk, dv, scores, v, q, dout, lse2, delta, scale_log2, PRECISION)

    at = (split * batches + batch) * dk_b + kv_head * dk_h + first_key * dk_r
    offsets = tile_offsets(dk_r, BLOCK_N, BLOCK_D)
    store_tile(dk_ptr + at, offsets, dk * scale, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr + at, offsets, dv, HEAD_DIM, BLOCK_D)
