"""Slash tiles: forward, query-major dQ and key-major dK/dV. No atomics, every sum in a fixed order.

One program owns one tile of rows (or keys) of one head and walks its list (triton/lists.py). The tile on the causal
diagonal comes last and, without starts, is the only one that needs a token mask. With starts
(``RowLists.reach``) a tile that holds a key before the start of one of its queries needs one too; which do, one
comparison of two numbers says.

Programs of one head stand together, neighbouring rows side by side and longer rows first. They walk the same list at
the same pace, so what one row reads through one diagonal its neighbours soon read through the next, from the L2 cache.
(Heads of a group side by side share less, because their lists differ. Forward at 512K tokens with 103 blocks a row
took 147 ms in that order and 124 ms in this one.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtraining.kernel.triton.common import (
    LOG2E,
    KeyGradients,
    RowLists,
    Strided,
    key_gradient_step,
    load_lse2,
    load_partial,
    load_tile,
    query_gradient_step,
    softmax_step,
    start_of_head,
    start_of_row,
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
def _reach(lists: RowLists, n_rows, batch, token, SIZE: tl.constexpr, COUNT: tl.constexpr):
    """Bounds of COUNT tokens of the rows from local ``token`` on [COUNT], the least of them and the greatest.

    Of queries, the first local key that each may attend; of keys, the end of the local queries that may attend to
    each. Both ascend. Zeros without starts, which nobody reads.
    """
    if lists.reach is not None:
        reach = lists.reach + batch * n_rows * SIZE + token
        bounds = tl.load(reach + tl.arange(0, COUNT))
        least = tl.load(reach)
        greatest = tl.load(reach + COUNT - 1)
    else:
        bounds = tl.zeros([COUNT], tl.int32)
        least = 0
        greatest = 0
    return bounds, least, greatest


@triton.jit
def _visited_tile(
    x: Strided, descriptor, base, offsets, batch, kv_head, start, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK keys (or values) [BLOCK, BLOCK_D] from local row ``start``.

    ``descriptor`` is the tensor's TMA descriptor if TMA, else unused; ``base`` and ``offsets`` are for plain loads.
    """
    if TMA:
        tile = descriptor.load([batch.to(tl.int32), start.to(tl.int32), kv_head.to(tl.int32), 0]).reshape(
            BLOCK, BLOCK_D
        )
    else:
        tile = load_tile(base + start * x.row, offsets, HEAD_DIM, BLOCK_D)
    return tile


@triton.jit(do_not_specialize=["kv_heads", "n_rows", "n_cols", "diagonal"])
def forward_kernel(
    q: Strided, k: Strided, v: Strided, k_descriptor, v_descriptor, out: Strided, lse_ptr, lists: RowLists,
    scale, kv_heads, n_rows, n_cols, diagonal,
    HAS_PREV: tl.constexpr, TOEPLITZ: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """(out, lse) of one tile of queries, merged with what is already there if HAS_PREV."""
    # Prologue: find the tiles that these queries visit, and load what stays for the whole loop.
    batch, head, kv_head, i, part = _query_program(n_rows, kv_heads, GROUP, SIZE // BLOCK_M)
    bh = batch * kv_heads * GROUP + head
    first, least, greatest = _reach(lists, n_rows, batch, i * SIZE + part * BLOCK_M, SIZE, BLOCK_M)
    limit = n_cols if lists.reach is None else n_cols - least // SIZE
    row = tile_row(lists, n_rows, n_cols, limit, diagonal, bh, i, TOEPLITZ, False)
    if HAS_PREV and row.hi == row.lo:
        return
    first_row = i.to(tl.int64) * SIZE + part * BLOCK_M
    q_base = start_of_row(q, batch, head, first_row)
    out_base = start_of_row(out, batch, head, first_row)
    out_offsets = tile_offsets(out.row, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    lse_rows = lse_ptr + bh * n_rows * SIZE + first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    k_base = start_of_head(k, batch, kv_head)
    v_base = start_of_head(v, batch, kv_head)
    k_offsets = tile_offsets(k.row, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_offsets = tile_offsets(v.row, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]

    scale_log2 = scale * LOG2E
    # [BLOCK_M, BLOCK_D]
    queries = load_tile(q_base, tile_offsets(q.row, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)
    # acc [BLOCK_M, BLOCK_D], top and total [BLOCK_M]
    acc, top, total = load_partial(out_base, out_offsets, lse_rows, HAS_PREV, BLOCK_M, HEAD_DIM, BLOCK_D)
    SUB: tl.constexpr = SIZE // BLOCK_N

    # Steady state: one tile of keys a step. The tile on the diagonal comes last, only as far as these queries see.
    free = (row.hi - row.lo - row.own) * SUB
    # A list entry is read one step ahead of its use.
    entry = tl.load(row.entries + tile_place(0, row, SUB))
    for t in range(0, free + row.own * tl.cdiv((part + 1) * BLOCK_M, BLOCK_N)):
        start = tile_slot(entry, row.origin, TOEPLITZ, False) * SIZE + (t % SUB) * BLOCK_N
        entry = tl.load(row.entries + tile_place(t + 1, row, SUB))
        # [BLOCK_N, BLOCK_D]
        keys = _visited_tile(
            k, k_descriptor, k_base, k_offsets, batch, kv_head, start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA
        )
        values = _visited_tile(
            v, v_descriptor, v_base, v_offsets, batch, kv_head, start, BLOCK_N, HEAD_DIM, BLOCK_D, TMA
        )
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if t >= free:
            key = (t % SUB) * BLOCK_N + tl.arange(0, BLOCK_N)
            query = part * BLOCK_M + tl.arange(0, BLOCK_M)
            scores = tl.where(query[:, None] < key[None, :], float("-inf"), scores)
        if lists.reach is not None:  # noqa: SIM102 -- the one is decided when compiling, the other when running
            if start < greatest:
                at = start.to(tl.int32) + tl.arange(0, BLOCK_N)
                scores = tl.where(at[None, :] < first[:, None], float("-inf"), scores)
        # Every row sees the first key of a tile on the diagonal, so no row is still at -inf afterwards. Before the
        # start of a row there may be whole tiles.
        acc, top, total = softmax_step(
            acc, top, total, scores, values, scale_log2, lists.reach is not None, PRECISION
        )

    # Epilogue.
    store_partial(out_base, out_offsets, lse_rows, acc, top, total, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["kv_heads", "n_rows", "n_cols", "diagonal"])
def query_gradient_kernel(
    do: Strided, q: Strided, k: Strided, v: Strided, lse_ptr, delta_ptr, dq: Strided, lists: RowLists,
    scale, kv_heads, n_rows, n_cols, diagonal,
    ADD: tl.constexpr, TOEPLITZ: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, added to what is there if ADD, over its slash tiles."""
    # Prologue: find the tiles that these queries visit, and load what stays for the whole loop.
    batch, head, kv_head, i, part = _query_program(n_rows, kv_heads, GROUP, SIZE // BLOCK_M)
    bh = batch * kv_heads * GROUP + head
    first, least, greatest = _reach(lists, n_rows, batch, i * SIZE + part * BLOCK_M, SIZE, BLOCK_M)
    limit = n_cols if lists.reach is None else n_cols - least // SIZE
    row = tile_row(lists, n_rows, n_cols, limit, diagonal, bh, i, TOEPLITZ, False)
    if ADD and row.hi == row.lo:
        return
    first_row = i.to(tl.int64) * SIZE + part * BLOCK_M
    q_base = start_of_row(q, batch, head, first_row)
    do_base = start_of_row(do, batch, head, first_row)
    dq_base = start_of_row(dq, batch, head, first_row)
    stat_rows = bh * n_rows * SIZE + first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    k_base = start_of_head(k, batch, kv_head)
    v_base = start_of_head(v, batch, kv_head)
    k_offsets = tile_offsets(k.row, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_offsets = tile_offsets(v.row, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]

    scale_log2 = scale * LOG2E
    # [BLOCK_M, BLOCK_D]
    queries = load_tile(q_base, tile_offsets(q.row, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)
    dout = load_tile(do_base, tile_offsets(do.row, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    lse2 = load_lse2(lse_ptr + stat_rows)  # [BLOCK_M]
    delta = tl.load(delta_ptr + stat_rows)  # [BLOCK_M]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    SUB: tl.constexpr = SIZE // BLOCK_N

    # Steady state: one tile of keys a step, the tile on the diagonal last.
    free = (row.hi - row.lo - row.own) * SUB
    entry = tl.load(row.entries + tile_place(0, row, SUB))
    for t in range(0, free + row.own * tl.cdiv((part + 1) * BLOCK_M, BLOCK_N)):
        start = tile_slot(entry, row.origin, TOEPLITZ, False) * SIZE + (t % SUB) * BLOCK_N
        entry = tl.load(row.entries + tile_place(t + 1, row, SUB))
        keys = load_tile(k_base + start * k.row, k_offsets, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        values = load_tile(v_base + start * v.row, v_offsets, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if t >= free:
            key = (t % SUB) * BLOCK_N + tl.arange(0, BLOCK_N)
            query = part * BLOCK_M + tl.arange(0, BLOCK_M)
            scores = tl.where(query[:, None] < key[None, :], float("-inf"), scores)
        if lists.reach is not None:  # noqa: SIM102 -- the one is decided when compiling, the other when running
            if start < greatest:
                at = start.to(tl.int32) + tl.arange(0, BLOCK_N)
                scores = tl.where(at[None, :] < first[:, None], float("-inf"), scores)
        total = query_gradient_step(total, scores, dout, keys, values, lse2, delta, scale_log2, PRECISION)

    # Epilogue.
    dq_offsets = tile_offsets(dq.row, BLOCK_M, BLOCK_D)
    total = total * scale
    if ADD:
        total += load_tile(dq_base, dq_offsets, HEAD_DIM, BLOCK_D)
    store_tile(dq_base, dq_offsets, total, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["batches", "kv_heads", "n_rows", "n_cols", "diagonal"])
def key_gradient_kernel(
    do: Strided, q: Strided, k: Strided, v: Strided, lse_ptr, delta_ptr, dkv: KeyGradients, lists: RowLists,
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
    # First keys first: under causality they have the longest rows.
    tile = (pid // SPLITS) % (n_rows * SUBTILES)
    rest = pid // SPLITS // (n_rows * SUBTILES)
    kv_head = (rest % kv_heads).to(tl.int64)
    batch = (rest // kv_heads).to(tl.int64)
    j, part = tile // SUBTILES, tile % SUBTILES

    # Prologue: load the keys and values, which stay for the whole loop.
    first_key = j.to(tl.int64) * SIZE + part * BLOCK_N
    k_base = start_of_row(k, batch, kv_head, first_key)
    v_base = start_of_row(v, batch, kv_head, first_key)
    q_offsets = tile_offsets(q.row, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do_offsets = tile_offsets(do.row, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    lane = tl.arange(0, BLOCK_M)

    ends, least, greatest = _reach(lists, n_rows, batch, first_key, SIZE, BLOCK_N)
    limit = n_cols if lists.reach is None else tl.cdiv(greatest, SIZE)

    scale_log2 = scale * LOG2E
    keys = load_tile(k_base, tile_offsets(k.row, BLOCK_N, BLOCK_D), HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    values = load_tile(v_base, tile_offsets(v.row, BLOCK_N, BLOCK_D), HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # Steady state: head after head of the group, one tile of queries a step.
    for g in range(0, HEADS):
        head = kv_head * GROUP + split * HEADS + g
        bh = batch * kv_heads * GROUP + head
        row = tile_row(lists, n_rows, n_cols, limit, diagonal, bh, j, TOEPLITZ, True)
        q_base = start_of_head(q, batch, head)
        do_base = start_of_head(do, batch, head)
        lse_base = lse_ptr + bh * n_cols * SIZE
        delta_base = delta_ptr + bh * n_cols * SIZE

        # Queries before this tile of keys see nothing of the tile on the diagonal.
        skip = part * BLOCK_N // BLOCK_M
        free = (row.hi - row.lo - row.own) * SUB
        entry = tl.load(row.entries + tile_place(0, row, SUB))
        for t in range(0, free + row.own * (SUB - skip)):
            sub = t % SUB + tl.where(t >= free, skip, 0)
            at = tile_slot(entry, row.origin, TOEPLITZ, True) * SIZE + sub * BLOCK_M
            entry = tl.load(row.entries + tile_place(t + 1, row, SUB))
            queries = load_tile(q_base + at * q.row, q_offsets, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            dout = load_tile(do_base + at * do.row, do_offsets, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            lse2 = load_lse2(lse_base + at + lane)  # [BLOCK_M]
            delta = tl.load(delta_base + at + lane)  # [BLOCK_M]
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            if t >= free:
                key = part * BLOCK_N + tl.arange(0, BLOCK_N)
                scores = tl.where(key[:, None] > (sub * BLOCK_M + lane)[None, :], float("-inf"), scores)
            if lists.reach is not None:  # noqa: SIM102 -- the one is decided when compiling, the other when running
                if at + BLOCK_M > least:
                    query = at.to(tl.int32) + lane
                    scores = tl.where(query[None, :] >= ends[:, None], float("-inf"), scores)
            dk, dv = key_gradient_step(
                dk, dv, scores, values, queries, dout, lse2, delta, scale_log2, PRECISION
            )

    # Epilogue.
    to = (split * batches + batch) * dkv.batch + kv_head * dkv.head + first_key * dkv.row
    offsets = tile_offsets(dkv.row, BLOCK_N, BLOCK_D)
    store_tile(dkv.dk + to, offsets, dk * scale, HEAD_DIM, BLOCK_D)
    store_tile(dkv.dv + to, offsets, dv, HEAD_DIM, BLOCK_D)
