"""Key-major gradients on Hopper: dK and dV of slash tiles and of columns (hopper/queries.py has dQ).

One program owns 128 keys (or columns), 64 a warp group, and walks the queries that see them, 64 at a time; their
log-sum-exp and delta come with them through the copy engine.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mtraining.kernel.hopper.common import LOG2E, barriers, product_layout
from mtraining.kernel.hopper.items import fetch_halves
from mtraining.kernel.triton.common import tile_row, tile_slot


@gluon.jit
def _fetch_queries(
    done, at, batch, head, bh, q_desc, do_desc, lse_desc, delta_desc, q, do, lse, delta, full, empty,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the queries from local row ``at`` when their stage is free."""
    stage = done % STAGES
    here = full.index(stage)
    mbarrier.wait(empty.index(stage), ((done // STAGES) & 1) ^ 1)
    mbarrier.expect(here, 2 * q_desc.block_type.nbytes + 2 * lse_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [batch, at, head, 0], here, q.index(stage))
    tma.async_copy_global_to_shared(do_desc, [batch, at, head, 0], here, do.index(stage))
    tma.async_copy_global_to_shared(lse_desc, [bh, at], here, lse.index(stage))
    tma.async_copy_global_to_shared(delta_desc, [bh, at], here, delta.index(stage))


@gluon.jit
def _row_of(
    entries, bounds, row_blocks, col_blocks, bh, j, n_rows, n_cols, diagonal, begin, end, TOEPLITZ: gl.constexpr,
    COLUMNS: gl.constexpr,
):  # fmt: skip
    """First entry, number of blocks of queries, origin, 1 if the diagonal tile comes first. Columns: [begin, end)."""
    if COLUMNS:
        row, count, origin, own = entries, end - begin, 0, 0
    else:
        row, lo, hi, origin, own = tile_row(
            entries, bounds, row_blocks, col_blocks, bh.to(gl.int64), j, n_rows, n_cols, diagonal, TOEPLITZ,
            True,
        )  # fmt: skip
        row += lo
        count = hi - lo
    return row, count, origin, own


@gluon.jit
def _producer(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, q, do, lse, delta, k, v, kv_full, full, empty,
    entries, bounds, row_blocks, col_blocks, batch, kv_head, head0, bh0, j, n_rows, n_cols, diagonal, begin, end,
    TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, HEADS: gl.constexpr, SIZE: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    SUB: gl.constexpr = SIZE // BLOCK_M
    mbarrier.expect(kv_full.index(0), 4 * k_desc.block_type.nbytes)
    fetch_halves(k_desc, batch, j * SIZE, kv_head, kv_full.index(0), k, SIZE // 2)
    fetch_halves(v_desc, batch, j * SIZE, kv_head, kv_full.index(0), v, SIZE // 2)
    done = 0
    for g in range(0, HEADS):
        row, count, origin, _ = _row_of(
            entries, bounds, row_blocks, col_blocks, bh0 + g, j, n_rows, n_cols, diagonal, begin, end,
            TOEPLITZ, COLUMNS,
        )  # fmt: skip
        for t in range(0, count * SUB):
            if COLUMNS:
                at = begin * SIZE + t * BLOCK_M
            else:
                slot = tile_slot(gl.load(row + t // SUB), origin, TOEPLITZ, True).to(gl.int32)
                at = slot * SIZE + (t % SUB) * BLOCK_M
            _fetch_queries(
                done, at, batch, head0 + g, bh0 + g, q_desc, do_desc, lse_desc, delta_desc, q, do, lse, delta, full,
                empty, STAGES,
            )  # fmt: skip
            done += 1


@gluon.jit
def _hidden_bits(words, words_row, i, key, W: gl.constexpr, SIZE: gl.constexpr):
    """The words (triton/hidden.py) that hold the bits of 64 columns for local block of queries ``i``."""
    return gl.load(words + i.to(gl.int64) * words_row + W * (SIZE // 64) + (key % (SIZE // 2)) // 32)


@gluon.jit
def _hide(
    s, t, own, key, at, bits, q_blocks, begin, masked_to,
    W: gl.constexpr, COLUMNS: gl.constexpr, SIZE: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Scores (64 keys, BLOCK_M queries) of a head's step ``t`` with -inf where a query must not see a key.

    Args:
        own: 1 if the first block of queries is on the causal diagonal. Slash tiles only; for columns only:
        key, at: int32 (64,), number within the tile, and position.
        bits: :func:`_hidden_bits` of the step's block of queries.
        masked_to: the first block of queries, from ``begin`` on, that lies after all keys.
    """
    S_MMA: gl.constexpr = product_layout(BLOCK_M)
    SUB: gl.constexpr = SIZE // BLOCK_M
    if COLUMNS:
        s = gl.where((((bits >> (key % 32)) & 1) != 0)[:, None], float("-inf"), s)
        i = begin + t // SUB
        if i < masked_to:
            lane = (t % SUB) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_MMA))
            position = gl.load(q_blocks + i) * SIZE + lane
            s = gl.where(at[:, None] > position[None, :], float("-inf"), s)
    else:
        if t < own * SUB:
            lane = (t % SUB) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_MMA))
            s = gl.where(key[:, None] > lane[None, :], float("-inf"), s)
    return s


@gluon.jit
def _weights_and_gradient(
    s, v, do, lse, delta, zero, scale_log2, dtype: gl.constexpr, BLOCK_M: gl.constexpr, OPERAND: gl.constexpr
):
    """Weights and gradient of (64 keys, BLOCK_M queries) scores, as left operands of dV and dK."""
    COLUMN: gl.constexpr = gl.SliceLayout(0, product_layout(BLOCK_M))
    token = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse2 = lse.reshape([BLOCK_M]).load(COLUMN)
    weights = gl.exp2(s * scale_log2 - lse2[None, :])
    delta = delta.reshape([BLOCK_M]).load(COLUMN)
    dweights = warpgroup_mma_wait(0, deps=[token])
    gradient = weights * (dweights - delta[None, :])
    return gl.convert_layout(weights.to(dtype), OPERAND), gl.convert_layout(gradient.to(dtype), OPERAND)


@gluon.jit
def _consumer(
    q_smem, do_smem, lse, delta, k_smem, v_smem, kv_full, full, empty, dk_base, dv_base,
    entries, bounds, row_blocks, col_blocks, bh0, j, n_rows, n_cols, diagonal, begin, end,
    columns, words, words_row, q_blocks, masked_to, present, scale,
    dk_r: gl.constexpr, W: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, HEADS: gl.constexpr,
    SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of 64 keys over every query that sees them, of HEADS heads one after the other."""
    HALF: gl.constexpr = SIZE // 2
    SUB: gl.constexpr = SIZE // BLOCK_M
    S_MMA: gl.constexpr = product_layout(BLOCK_M)
    O_MMA: gl.constexpr = product_layout(HEAD_DIM)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, O_MMA, 2)
    dtype: gl.constexpr = q_smem.dtype
    key = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, S_MMA))
    at = key
    if COLUMNS:
        at = gl.load(columns + key, mask=key < present, other=2147483647)
    scale_log2 = scale * LOG2E
    zero = gl.zeros([HALF, BLOCK_M], gl.float32, S_MMA)
    dk = gl.zeros([HALF, HEAD_DIM], gl.float32, O_MMA)
    dv = gl.zeros([HALF, HEAD_DIM], gl.float32, O_MMA)
    mbarrier.wait(kv_full.index(0), 0)
    k = k_smem.index(W).reshape([HALF, HEAD_DIM])
    v = v_smem.index(W).reshape([HALF, HEAD_DIM])
    done = 0
    for g in range(0, HEADS):
        _, count, _, own = _row_of(
            entries, bounds, row_blocks, col_blocks, bh0 + g, j, n_rows, n_cols, diagonal, begin, end,
            TOEPLITZ, COLUMNS,
        )  # fmt: skip
        if count > 0:
            stage = done % STAGES
            mbarrier.wait(full.index(stage), (done // STAGES) & 1)
            q = q_smem.index(stage).reshape([BLOCK_M, HEAD_DIM])
            s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False)
            if COLUMNS:
                bits = _hidden_bits(words, words_row, begin, key, W, SIZE)
            else:
                bits = key
            s = _hide(s, 0, own, key, at, bits, q_blocks, begin, masked_to, W, COLUMNS, SIZE, BLOCK_M)
            for t in range(1, count * SUB):
                stage = done % STAGES
                do = do_smem.index(stage).reshape([BLOCK_M, HEAD_DIM])
                p, ds = _weights_and_gradient(
                    s, v, do, lse.index(stage), delta.index(stage), zero, scale_log2, dtype, BLOCK_M, OPERAND
                )
                done += 1
                after = done % STAGES
                mbarrier.wait(full.index(after), (done // STAGES) & 1)
                q = q_smem.index(after).reshape([BLOCK_M, HEAD_DIM])
                s_token = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                dv_token = warpgroup_mma(p, do, dv, is_async=True)
                q = q_smem.index(stage).reshape([BLOCK_M, HEAD_DIM])
                dk_token = warpgroup_mma(ds, q, dk, is_async=True)
                if COLUMNS:
                    bits = _hidden_bits(words, words_row, begin + t // SUB, key, W, SIZE)
                s, dv, dk, p, ds = warpgroup_mma_wait(0, deps=[s_token, dv_token, dk_token, p, ds])
                mbarrier.arrive(empty.index(stage), count=1)
                s = _hide(s, t, own, key, at, bits, q_blocks, begin, masked_to, W, COLUMNS, SIZE, BLOCK_M)
            stage = done % STAGES
            do = do_smem.index(stage).reshape([BLOCK_M, HEAD_DIM])
            p, ds = _weights_and_gradient(
                s, v, do, lse.index(stage), delta.index(stage), zero, scale_log2, dtype, BLOCK_M, OPERAND
            )
            dv_token = warpgroup_mma(p, do, dv, is_async=True)
            dk_token = warpgroup_mma(ds, q_smem.index(stage).reshape([BLOCK_M, HEAD_DIM]), dk, is_async=True)
            dv, dk, p, ds = warpgroup_mma_wait(0, deps=[dv_token, dk_token, p, ds])
            mbarrier.arrive(empty.index(stage), count=1)
            done += 1
    lane = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, O_MMA))
    offsets = lane[:, None] * dk_r + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_MMA))[None, :]
    if COLUMNS:
        gl.store(dk_base + offsets, dk * scale, mask=(lane < present)[:, None])
        gl.store(dv_base + offsets, dv, mask=(lane < present)[:, None])
    else:
        gl.store(dk_base + offsets, dk * scale)
        gl.store(dv_base + offsets, dv)


@gluon.jit
def _key_gradient(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dk_base, dv_base, entries, bounds, row_blocks, col_blocks,
    batch, kv_head, head0, bh0, j, n_rows, n_cols, diagonal, begin, end,
    columns, words, words_row, q_blocks, masked_to, present, scale,
    dk_r: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, HEADS: gl.constexpr, SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    k = gl.allocate_shared_memory(k_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], k_desc.layout)
    q = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, BLOCK_M, 1, HEAD_DIM], q_desc.layout)
    do = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, BLOCK_M, 1, HEAD_DIM], q_desc.layout)
    lse = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], lse_desc.layout)
    delta = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], lse_desc.layout)
    kv_full, full, empty = barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q, do, lse, delta, k, v, kv_full, full, empty, dk_base, dv_base,
                    entries, bounds, row_blocks, col_blocks, bh0, j, n_rows, n_cols, diagonal, begin, end,
                    columns, words, words_row, q_blocks, masked_to, present, scale,
                    dk_r, 0, TOEPLITZ, COLUMNS, HEADS, SIZE, HEAD_DIM, BLOCK_M, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    q, do, lse, delta, k, v, kv_full, full, empty, dk_base, dv_base,
                    entries, bounds, row_blocks, col_blocks, bh0, j, n_rows, n_cols, diagonal, begin, end,
                    columns, words, words_row, q_blocks, masked_to, present, scale,
                    dk_r, 1, TOEPLITZ, COLUMNS, HEADS, SIZE, HEAD_DIM, BLOCK_M, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, q, do, lse, delta, k, v,
                    kv_full, full, empty,
                    entries, bounds, row_blocks, col_blocks, batch, kv_head, head0, bh0, j, n_rows, n_cols, diagonal,
                    begin, end, TOEPLITZ, COLUMNS, HEADS, SIZE, BLOCK_M, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["batches", "kv_heads", "n_rows", "n_cols", "diagonal"])
def key_tiles_kernel(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dk_ptr, dv_ptr, entries, bounds, row_blocks, col_blocks,
    dk_b, dk_r: gl.constexpr, dk_h, scale, batches, kv_heads, n_rows, n_cols, diagonal,
    TOEPLITZ: gl.constexpr, GROUP: gl.constexpr, SPLITS: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys from GROUP / SPLITS query heads of its group; rows are key blocks here.

    dk and dv are (SPLITS, batch, keys, kv_heads, head_dim): a caller with SPLITS > 1 sums over the first axis.
    """
    HEADS: gl.constexpr = GROUP // SPLITS
    pid = gl.program_id(0)
    split = pid % SPLITS
    j = (pid // SPLITS) % n_rows  # the first keys have the longest rows
    rest = pid // SPLITS // n_rows
    kv_head = rest % kv_heads
    batch = rest // kv_heads
    head0 = kv_head * GROUP + split * HEADS
    at = (
        (split * batches + batch).to(gl.int64) * dk_b
        + kv_head.to(gl.int64) * dk_h
        + j.to(gl.int64) * SIZE * dk_r
    )
    _key_gradient(
        q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dk_ptr + at, dv_ptr + at,
        entries, bounds, row_blocks, col_blocks, batch, kv_head, head0, batch * kv_heads * GROUP + head0, j,
        n_rows, n_cols, diagonal, 0, 0, entries, entries, 0, row_blocks, 0, SIZE, scale,
        dk_r, TOEPLITZ, False, HEADS, SIZE, HEAD_DIM, BLOCK_M, STAGES,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["batches", "heads", "n_rows", "capacity", "num_blocks", "words_row", "splits"])
def key_columns_kernel(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dk_ptr, dv_ptr, columns_ptr, words_ptr, q_blocks, first_slot,
    first_seen, dk_b, dk_r: gl.constexpr, dk_h, scale, batches, heads, n_rows, capacity, num_blocks, words_row, splits,
    SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of columns over one of ``splits`` equal shares of the queries that see it.

    ``first_slot``, ``first_seen``: see ``ColumnTables`` of triton/hidden.py.
    dk and dv are (splits, batch, capacity, heads, head_dim): the caller sums over the first axis.
    """
    pid = gl.program_id(0)
    split = pid % splits
    head = (pid // splits) % heads
    batch = (pid // splits // heads) % batches
    tile = (
        pid // splits // heads // batches
    )  # the longest first, of all heads: few, and the last must be short
    bh = batch * heads + head
    columns = columns_ptr + bh.to(gl.int64) * capacity + tile * SIZE
    present = capacity - tile * SIZE
    # Columns are sorted, and the padding (num_blocks * SIZE) comes last.
    latest = gl.minimum(gl.load(columns + gl.minimum(present, SIZE) - 1), num_blocks * SIZE - 1)
    seen = first_seen + bh.to(gl.int64) * words_row + tile * (SIZE // 32)
    lo = gl.load(seen)
    for w in gl.static_range(1, SIZE // 32):
        lo = gl.minimum(lo, gl.load(seen + w))
    masked_to = gl.load(first_slot + latest // SIZE + 1)
    share = gl.cdiv(n_rows - lo, splits)
    begin = lo + split * share
    end = gl.maximum(begin, gl.minimum(begin + share, n_rows))
    words = words_ptr + bh.to(gl.int64) * n_rows * words_row + tile * (SIZE // 32)
    at = (
        (split * batches + batch).to(gl.int64) * dk_b
        + head.to(gl.int64) * dk_h
        + tile.to(gl.int64) * SIZE * dk_r
    )
    _key_gradient(
        q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dk_ptr + at, dv_ptr + at,
        columns_ptr, columns_ptr, columns_ptr, columns_ptr, batch, head, head, bh, tile, n_rows, n_rows, 0,
        begin, end,
        columns, words, words_row, q_blocks, masked_to, present, scale,
        dk_r, False, True, 1, SIZE, HEAD_DIM, BLOCK_M, STAGES,
    )  # fmt: skip
