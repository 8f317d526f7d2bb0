"""Gradients on Hopper, split: query-major dQ and key-major dK/dV, of slash tiles and of columns (``hopper_common``).

No atomics, every sum in a fixed order. Within a step nothing but dP runs under the exponentials; the next tile's
scores are multiplied beside this tile's gradients, and all products end before the step does: products in
flight across the end of a loop would have to be copied, and the assembler then waits for each one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mtraining.kernel.hopper_common import (
    LOG2E,
    barriers,
    column_bias,
    fetch_halves,
    fetch_keys,
    hidden_word,
    hide_after,
    hide_columns,
    key_buffers,
    product_layout,
)
from mtraining.kernel.triton_common import tile_row, tile_slot


@gluon.jit
def _query_producer(
    q_desc, do_desc, k_desc, v_desc, q, do, q_full, k, v, k_full, k_empty, v_full, v_empty, batch, head, kv_head,
    first_row, row, origin, steps,
    TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(q_full.index(0), 4 * q_desc.block_type.nbytes)
    fetch_halves(q_desc, batch, first_row, head, q_full.index(0), q, SIZE // 2)
    fetch_halves(do_desc, batch, first_row, head, q_full.index(0), do, SIZE // 2)
    for t in range(0, steps):
        if COLUMNS:
            start = t * SIZE
        else:
            start = tile_slot(gl.load(row + t), origin, TOEPLITZ, False).to(gl.int32) * SIZE
        fetch_keys(t, start, batch, kv_head, k_desc, v_desc, k, v, k_full, k_empty, v_full, v_empty, STAGES)


@gluon.jit
def _score_gradient(
    s,
    do,
    v,
    v_full,
    v_empty,
    phase,
    zero,
    lse2,
    delta,
    scale_log2,
    dtype: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Gradient of (64 queries, keys) scores, as the left operand of dQ."""
    mbarrier.wait(v_full, phase)
    token = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    weights = gl.exp2(s * scale_log2 - lse2[:, None])
    dweights = warpgroup_mma_wait(0, deps=[token])
    mbarrier.arrive(v_empty, count=1)
    return gl.convert_layout((weights * (dweights - delta[:, None])).to(dtype), OPERAND)


@gluon.jit
def _query_consumer(
    q_smem, do_smem, q_full, k_smem, v_smem, k_full, k_empty, v_full, v_empty, dq_base, lse_base, delta_base,
    steps, own, words, columns, whole, position, capacity, scale,
    dq_r: gl.constexpr, W: gl.constexpr, ADD: gl.constexpr, COLUMNS: gl.constexpr, SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of 64 queries, added to what is there if ADD."""
    HALF: gl.constexpr = SIZE // 2
    S_MMA: gl.constexpr = product_layout(SIZE)
    O_MMA: gl.constexpr = product_layout(HEAD_DIM)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, O_MMA, 2)
    dtype: gl.constexpr = q_smem.dtype
    rows = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, S_MMA))
    lse2 = gl.load(lse_base + rows)
    delta = gl.load(delta_base + rows)
    scale_log2 = scale * LOG2E
    zero = gl.zeros([HALF, SIZE], gl.float32, S_MMA)
    dq = gl.zeros([HALF, HEAD_DIM], gl.float32, O_MMA)
    mbarrier.wait(q_full.index(0), 0)
    q = q_smem.index(W).reshape([HALF, HEAD_DIM])
    do = do_smem.index(W).reshape([HALF, HEAD_DIM])
    if steps > 0:
        mbarrier.wait(k_full.index(0), 0)
        k = k_smem.index(0).reshape([SIZE, HEAD_DIM])
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False)
        if COLUMNS:
            word = hidden_word(words, 0, steps, SIZE)
            s = hide_columns(s, column_bias(word, SIZE), 0, columns, whole, position, capacity, W, SIZE)
        else:
            s = hide_after(s, own, W, SIZE)
        if COLUMNS:
            word = hidden_word(words, 1, steps, SIZE)
        for t in range(0, steps - 1):
            stage = t % STAGES
            after = (t + 1) % STAGES
            ds = _score_gradient(
                s, do, v_smem.index(stage).reshape([SIZE, HEAD_DIM]), v_full.index(stage), v_empty.index(stage),
                (t // STAGES) & 1, zero, lse2, delta, scale_log2, dtype, OPERAND,
            )  # fmt: skip
            mbarrier.wait(k_full.index(after), ((t + 1) // STAGES) & 1)
            k = k_smem.index(after).reshape([SIZE, HEAD_DIM])
            s_token = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            dq_token = warpgroup_mma(ds, k_smem.index(stage).reshape([SIZE, HEAD_DIM]), dq, is_async=True)
            if COLUMNS:
                bias = column_bias(word, SIZE)
                word = hidden_word(words, t + 2, steps, SIZE)  # a step ahead of its use
            s, dq, ds = warpgroup_mma_wait(0, deps=[s_token, dq_token, ds])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if COLUMNS:
                s = hide_columns(s, bias, t + 1, columns, whole, position, capacity, W, SIZE)
        last = steps - 1
        stage = last % STAGES
        ds = _score_gradient(
            s, do, v_smem.index(stage).reshape([SIZE, HEAD_DIM]), v_full.index(stage), v_empty.index(stage),
            (last // STAGES) & 1, zero, lse2, delta, scale_log2, dtype, OPERAND,
        )  # fmt: skip
        dq = warpgroup_mma(ds, k_smem.index(stage).reshape([SIZE, HEAD_DIM]), dq)
    lane = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, O_MMA))
    ptrs = dq_base + lane[:, None] * dq_r + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_MMA))[None, :]
    dq = dq * scale
    if ADD:
        dq += gl.load(ptrs)
    gl.store(ptrs, dq)


@gluon.jit
def _query_gradient(
    q_desc, do_desc, k_desc, v_desc, dq_ptr, lse_ptr, delta_ptr, dq_b, dq_r: gl.constexpr, dq_h,
    batch, head, kv_head, heads, i, n_rows, row, origin, steps, own, words, columns, whole, position, capacity, scale,
    ADD: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    first_row = i * SIZE
    dq_base = dq_ptr + batch.to(gl.int64) * dq_b + head.to(gl.int64) * dq_h + first_row.to(gl.int64) * dq_r
    stat = ((batch * heads + head).to(gl.int64) * n_rows + i) * SIZE
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], q_desc.layout)
    do = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], q_desc.layout)
    q_full = barriers(1, 1)
    k, v, k_full, k_empty, v_full, v_empty = key_buffers(k_desc, v_desc, SIZE, HEAD_DIM, STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _query_consumer,
                (
                    q, do, q_full, k, v, k_full, k_empty, v_full, v_empty, dq_base, lse_ptr + stat, delta_ptr + stat,
                    steps, own, words, columns, whole, position, capacity, scale,
                    dq_r, 0, ADD, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                _query_consumer,
                (
                    q, do, q_full, k, v, k_full, k_empty, v_full, v_empty, dq_base, lse_ptr + stat, delta_ptr + stat,
                    steps, own, words, columns, whole, position, capacity, scale,
                    dq_r, 1, ADD, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                _query_producer,
                (
                    q_desc, do_desc, k_desc, v_desc, q, do, q_full, k, v, k_full, k_empty, v_full, v_empty,
                    batch, head, kv_head, first_row, row, origin, steps, TOEPLITZ, COLUMNS, SIZE, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["kv_heads", "n_rows", "n_cols", "diagonal"])
def query_tiles_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_ptr, lse_ptr, delta_ptr, entries, bounds, row_blocks, col_blocks,
    dq_b, dq_r: gl.constexpr, dq_h, scale, kv_heads, n_rows, n_cols, diagonal,
    ADD: gl.constexpr, TOEPLITZ: gl.constexpr, GROUP: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """dq of one block of queries over its slash tiles."""
    pid = gl.program_id(0)
    i = n_rows - 1 - pid % n_rows  # the longest rows first
    head = (pid // n_rows) % (kv_heads * GROUP)
    batch = pid // n_rows // (kv_heads * GROUP)
    bh = (batch * kv_heads * GROUP + head).to(gl.int64)
    row, lo, hi, origin, own = tile_row(
        entries, bounds, row_blocks, col_blocks, bh, i, n_rows, n_cols, diagonal, TOEPLITZ, False
    )
    _query_gradient(
        q_desc, do_desc, k_desc, v_desc, dq_ptr, lse_ptr, delta_ptr, dq_b, dq_r, dq_h,
        batch, head, head // GROUP, kv_heads * GROUP, i, n_rows, row + lo, origin, hi - lo, own,
        row, row, 0, 0, 0, scale, ADD, TOEPLITZ, False, SIZE, HEAD_DIM, STAGES,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["heads", "n_rows", "capacity", "words_row"])
def query_columns_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_ptr, lse_ptr, delta_ptr, columns_ptr, words_ptr, q_blocks, before_ptr, upto_ptr,
    dq_b, dq_r: gl.constexpr, dq_h, scale, heads, n_rows, capacity, words_row,
    ADD: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of one block of queries over its columns."""
    pid = gl.program_id(0)
    i = n_rows - 1 - pid % n_rows
    head = (pid // n_rows) % heads
    batch = pid // n_rows // heads
    bh = (batch * heads + head).to(gl.int64)
    upto = gl.load(upto_ptr + bh * n_rows + i)
    whole = gl.load(before_ptr + bh * n_rows + i) // SIZE
    words = words_ptr + (bh * n_rows + i) * words_row
    columns = columns_ptr + bh * capacity
    _query_gradient(
        q_desc, do_desc, k_desc, v_desc, dq_ptr, lse_ptr, delta_ptr, dq_b, dq_r, dq_h,
        batch, head, head, heads, i, n_rows, columns, 0, gl.cdiv(upto, SIZE), 0, words, columns, whole,
        gl.load(q_blocks + i) * SIZE, capacity, scale, ADD, False, True, SIZE, HEAD_DIM, STAGES,
    )  # fmt: skip
