"""Columns: dense tiles of compact keys over a causal prefix; forward, query-major dQ and key-major dK/dV.

The columns of a head are sorted, so the queries of a block see a prefix of them. Within the prefix, one bit a column
says whether the whole block must not see it. Such columns lie inside a slash tile of the block, to which they belong,
or after the block. The bits are computed once a call (triton/hidden.py) and read as one number a tile. The causal mask
inside the block itself is left for the kernels; it concerns the last tile or two. So is the mask by the starts of
single tokens, if there are starts; it concerns the tiles up to ``masked``, and the loop begins at ``begin``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtraining.kernel.triton.common import (
    LOG2E,
    KeyGradients,
    Strided,
    key_gradient_step,
    load_lse2,
    load_partial,
    load_tile,
    load_tile_rows,
    query_gradient_step,
    softmax_step,
    start_of_head,
    start_of_row,
    store_partial,
    store_tile,
    store_tile_rows,
    tile_offsets,
)
from mtraining.kernel.triton.hidden import KeyTables, QueryTables


@triton.jit
def _load_columns(columns, first, capacity, seq_len, BLOCK_N: tl.constexpr):
    """Positions [BLOCK_N] of a tile of columns; ``seq_len`` past the capacity."""
    at = first + tl.arange(0, BLOCK_N)
    return tl.load(columns + at, mask=at < capacity, other=seq_len)


@triton.jit
def _load_keys(base, offsets, present, EVEN: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of compact keys [BLOCK_N, BLOCK_D]; EVEN: the capacity is a whole number of tiles."""
    if EVEN:
        tile = load_tile(base, offsets, HEAD_DIM, BLOCK_D)
    else:
        tile = load_tile_rows(base, offsets, present, HEAD_DIM, BLOCK_D)
    return tile


@triton.jit
def _hidden(words, BLOCK_N: tl.constexpr):
    """Bits [BLOCK_N] of a tile of columns, from BLOCK_N // 32 numbers that stand side by side."""
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
    q: Strided, k: Strided, v: Strided, out: Strided, lse_ptr, tables: QueryTables,
    scale, heads, rows, capacity, num_blocks, words_row,
    HAS_PREV: tl.constexpr, EVEN: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(out, lse) of one tile of queries over its columns, merged with what is already there if HAS_PREV."""
    # Prologue: find the prefix of columns that these queries see, and load what stays for the whole loop.
    batch, head, i, part = _query_program(rows, heads, SIZE // BLOCK_M)
    bh = batch * heads + head
    upto = tl.load(tables.upto + bh * rows + i)
    if HAS_PREV and upto == 0:
        return
    whole = tl.load(tables.before + bh * rows + i) // BLOCK_N
    if tables.starts is None:
        begin = 0
    else:
        begin = tl.load(tables.begin + bh * rows + i) // BLOCK_N
    block = tl.load(tables.q_blocks + i)
    columns = tables.columns + bh * capacity
    words = tables.words + (bh * rows + i) * words_row
    if tables.starts is not None:
        masked = tl.load(tables.masked + bh * rows + i)
        tokens = (batch * rows + i) * SIZE + part * BLOCK_M + tl.arange(0, BLOCK_M)
        first = tl.load(tables.starts + tokens)  # [BLOCK_M]

    first_row = i.to(tl.int64) * SIZE + part * BLOCK_M
    q_base = start_of_row(q, batch, head, first_row)
    out_base = start_of_row(out, batch, head, first_row)
    out_offsets = tile_offsets(out.row, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    lse_rows = lse_ptr + bh * rows * SIZE + first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    k_base = start_of_head(k, batch, head)
    v_base = start_of_head(v, batch, head)
    k_offsets = tile_offsets(k.row, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_offsets = tile_offsets(v.row, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]

    scale_log2 = scale * LOG2E
    # [BLOCK_M, BLOCK_D]
    queries = load_tile(q_base, tile_offsets(q.row, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)
    # acc [BLOCK_M, BLOCK_D], top and total [BLOCK_M]
    acc, top, total = load_partial(out_base, out_offsets, lse_rows, HAS_PREV, BLOCK_M, HEAD_DIM, BLOCK_D)

    # Steady state: one tile of columns a step.
    for t in range(begin, tl.cdiv(upto, BLOCK_N)):
        start = tl.cast(t, tl.int64) * BLOCK_N
        present = capacity - t * BLOCK_N
        # [BLOCK_N, BLOCK_D]
        keys = _load_keys(k_base + start * k.row, k_offsets, present, EVEN, HEAD_DIM, BLOCK_D)
        values = _load_keys(v_base + start * v.row, v_offsets, present, EVEN, HEAD_DIM, BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        hidden = _hidden(words + t * (BLOCK_N // 32), BLOCK_N)  # [BLOCK_N]
        scores = tl.where(hidden[None, :], float("-inf"), scores)
        edge = t >= whole
        if tables.starts is not None:
            edge = edge | (t * BLOCK_N < masked)
        if edge:
            at = _load_columns(columns, t * BLOCK_N, capacity, num_blocks * SIZE, BLOCK_N)
            position = block * SIZE + part * BLOCK_M + tl.arange(0, BLOCK_M)
            scores = tl.where(at[None, :] > position[:, None], float("-inf"), scores)
            if tables.starts is not None:
                scores = tl.where(at[None, :] < first[:, None], float("-inf"), scores)
        acc, top, total = softmax_step(acc, top, total, scores, values, scale_log2, True, PRECISION)

    # Epilogue.
    store_partial(out_base, out_offsets, lse_rows, acc, top, total, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["heads", "rows", "capacity", "num_blocks", "words_row"])
def query_gradient_kernel(
    do: Strided, q: Strided, k: Strided, v: Strided, lse_ptr, delta_ptr, dq: Strided, tables: QueryTables,
    scale, heads, rows, capacity, num_blocks, words_row,
    ADD: tl.constexpr, EVEN: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, added to what is there if ADD, over its columns."""
    # Prologue: find the prefix of columns that these queries see, and load what stays for the whole loop.
    batch, head, i, part = _query_program(rows, heads, SIZE // BLOCK_M)
    bh = batch * heads + head
    upto = tl.load(tables.upto + bh * rows + i)
    if ADD and upto == 0:
        return
    whole = tl.load(tables.before + bh * rows + i) // BLOCK_N
    if tables.starts is None:
        begin = 0
    else:
        begin = tl.load(tables.begin + bh * rows + i) // BLOCK_N
    block = tl.load(tables.q_blocks + i)
    columns = tables.columns + bh * capacity
    words = tables.words + (bh * rows + i) * words_row
    if tables.starts is not None:
        masked = tl.load(tables.masked + bh * rows + i)
        tokens = (batch * rows + i) * SIZE + part * BLOCK_M + tl.arange(0, BLOCK_M)
        first = tl.load(tables.starts + tokens)  # [BLOCK_M]

    first_row = i.to(tl.int64) * SIZE + part * BLOCK_M
    q_base = start_of_row(q, batch, head, first_row)
    do_base = start_of_row(do, batch, head, first_row)
    dq_base = start_of_row(dq, batch, head, first_row)
    stat_rows = bh * rows * SIZE + first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    k_base = start_of_head(k, batch, head)
    v_base = start_of_head(v, batch, head)
    k_offsets = tile_offsets(k.row, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v_offsets = tile_offsets(v.row, BLOCK_N, BLOCK_D)  # [BLOCK_N, BLOCK_D]

    scale_log2 = scale * LOG2E
    # [BLOCK_M, BLOCK_D]
    queries = load_tile(q_base, tile_offsets(q.row, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)
    dout = load_tile(do_base, tile_offsets(do.row, BLOCK_M, BLOCK_D), HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    lse2 = load_lse2(lse_ptr + stat_rows)  # [BLOCK_M]
    delta = tl.load(delta_ptr + stat_rows)  # [BLOCK_M]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Steady state: one tile of columns a step.
    for t in range(begin, tl.cdiv(upto, BLOCK_N)):
        start = tl.cast(t, tl.int64) * BLOCK_N
        present = capacity - t * BLOCK_N
        # [BLOCK_N, BLOCK_D]
        keys = _load_keys(k_base + start * k.row, k_offsets, present, EVEN, HEAD_DIM, BLOCK_D)
        values = _load_keys(v_base + start * v.row, v_offsets, present, EVEN, HEAD_DIM, BLOCK_D)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        hidden = _hidden(words + t * (BLOCK_N // 32), BLOCK_N)  # [BLOCK_N]
        scores = tl.where(hidden[None, :], float("-inf"), scores)
        edge = t >= whole
        if tables.starts is not None:
            edge = edge | (t * BLOCK_N < masked)
        if edge:
            at = _load_columns(columns, t * BLOCK_N, capacity, num_blocks * SIZE, BLOCK_N)
            position = block * SIZE + part * BLOCK_M + tl.arange(0, BLOCK_M)
            scores = tl.where(at[None, :] > position[:, None], float("-inf"), scores)
            if tables.starts is not None:
                scores = tl.where(at[None, :] < first[:, None], float("-inf"), scores)
        total = query_gradient_step(total, scores, dout, keys, values, lse2, delta, scale_log2, PRECISION)

    # Epilogue.
    dq_offsets = tile_offsets(dq.row, BLOCK_M, BLOCK_D)
    total = total * scale
    if ADD:
        total += load_tile(dq_base, dq_offsets, HEAD_DIM, BLOCK_D)
    store_tile(dq_base, dq_offsets, total, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["batches", "heads", "rows", "capacity", "num_blocks", "words_row", "splits"])
def key_gradient_kernel(
    do: Strided, q: Strided, k: Strided, v: Strided, lse_ptr, delta_ptr, dkv: KeyGradients, tables: KeyTables,
    scale, batches, heads, rows, capacity, num_blocks, words_row, splits,
    EVEN: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of columns over one of ``splits`` equal shares of the queries that see it.

    dk and dv are (splits, batch, capacity, heads, head_dim): the caller sums over the first axis.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(capacity, BLOCK_N)
    tile = pid % tiles
    split = (pid // tiles) % splits
    head = ((pid // tiles // splits) % heads).to(tl.int64)
    batch = (pid // tiles // splits // heads).to(tl.int64)
    bh = batch * heads + head

    # Prologue: find the share of queries to walk, from the first that sees one of these columns on, and load the keys.
    first = tile.to(tl.int64) * BLOCK_N
    present = capacity - tile * BLOCK_N
    columns = tables.columns + bh * capacity
    at = _load_columns(columns, tile * BLOCK_N, capacity, num_blocks * SIZE, BLOCK_N)  # [BLOCK_N]
    last = tl.max(tl.where(at < num_blocks * SIZE, at, 0), 0) // SIZE
    seen = tables.first_seen + bh * words_row + tile * (BLOCK_N // 32)
    lo = tl.min(tl.load(seen + tl.arange(0, BLOCK_N // 32)), 0)
    # Blocks of queries from here on lie after all of these columns.
    masked_to = tl.load(tables.first_slot + last + 1)
    if tables.ends is None:
        hi = rows
    else:
        until = tables.last_seen + bh * words_row + tile * (BLOCK_N // 32)
        hi = tl.maximum(tl.max(tl.load(until + tl.arange(0, BLOCK_N // 32)), 0), lo)
        # Queries from here on may be past the end of some column. The padding has large ends.
        mine = first + tl.arange(0, BLOCK_N)
        ends = tl.load(tables.ends + bh * capacity + mine, mask=mine < capacity, other=rows * SIZE)
        least = tl.min(ends, 0)
    if tables.ends is None:
        share = tl.cdiv(hi - lo, splits)
        begin = lo + split * share
        end = tl.minimum(begin + share, hi)
    else:
        # Shares stand still, so that what one document selects does not regroup the sums of another in the same tile.
        share = tl.cdiv(rows, splits)
        begin = tl.maximum(split * share, lo)
        end = tl.minimum((split + 1) * share, hi)

    q_offsets = tile_offsets(q.row, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do_offsets = tile_offsets(do.row, BLOCK_M, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    q_base = start_of_head(q, batch, head)
    do_base = start_of_head(do, batch, head)
    lse_base = lse_ptr + bh * rows * SIZE
    delta_base = delta_ptr + bh * rows * SIZE
    words = tables.words + bh * rows * words_row + tile * (BLOCK_N // 32)
    k_base = start_of_row(k, batch, head, first)
    v_base = start_of_row(v, batch, head, first)
    lane = tl.arange(0, BLOCK_M)

    scale_log2 = scale * LOG2E
    keys = _load_keys(k_base, tile_offsets(k.row, BLOCK_N, BLOCK_D), present, EVEN, HEAD_DIM, BLOCK_D)
    values = _load_keys(v_base, tile_offsets(v.row, BLOCK_N, BLOCK_D), present, EVEN, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    SUB: tl.constexpr = SIZE // BLOCK_M

    # Steady state: one tile of queries a step.
    for t in range(begin * SUB, end * SUB):
        i = tl.cast(t // SUB, tl.int64)
        row = i * SIZE + (t % SUB) * BLOCK_M
        queries = load_tile(q_base + row * q.row, q_offsets, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        dout = load_tile(do_base + row * do.row, do_offsets, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        lse2 = load_lse2(lse_base + row + lane)  # [BLOCK_M]
        delta = tl.load(delta_base + row + lane)  # [BLOCK_M]
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        hidden = _hidden(words + i * words_row, BLOCK_N)  # [BLOCK_N]
        scores = tl.where(hidden[:, None], float("-inf"), scores)
        if i < masked_to:
            key = _load_columns(columns, tile * BLOCK_N, capacity, num_blocks * SIZE, BLOCK_N)
            position = tl.load(tables.q_blocks + i) * SIZE + (t % SUB) * BLOCK_M + lane
            scores = tl.where(key[:, None] > position[None, :], float("-inf"), scores)
        if tables.ends is not None:  # noqa: SIM102 -- the one is decided when compiling, the other when running
            if row + BLOCK_M > least:
                query = row.to(tl.int32) + lane
                scores = tl.where(query[None, :] >= ends[:, None], float("-inf"), scores)
        dk, dv = key_gradient_step(dk, dv, scores, values, queries, dout, lse2, delta, scale_log2, PRECISION)

    # Epilogue.
    to = (split * batches + batch) * dkv.batch + head * dkv.head + first * dkv.row
    offsets = tile_offsets(dkv.row, BLOCK_N, BLOCK_D)
    store_tile_rows(dkv.dk + to, offsets, dk * scale, present, HEAD_DIM, BLOCK_D)
    store_tile_rows(dkv.dv + to, offsets, dv, present, HEAD_DIM, BLOCK_D)
