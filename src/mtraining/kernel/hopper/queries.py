"""Query-major gradients on Hopper: dQ of slash tiles and columns (hopper/common.py; hopper/keys.py has dK and dV).

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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mtraining.kernel.hopper.common import (
    LOG2E,
    barriers,
    column_bias,
    hidden_word,
    hide_columns,
    hide_first,
    key_buffers,
    product_layout,
)
from mtraining.kernel.hopper.items import desk, producer, taken, visits_of


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
def _step(
    s, dq, done, word, columns, whole, position, t, capacity, lse2, delta, scale_log2,
    q, do, zero, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    W: gl.constexpr, COLUMN: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Gradients of a tile, and the scores of the next: a COLUMN tile, number ``t`` with the bits ``word``, or a slash
    tile that is not on the causal diagonal."""
    stage = done % STAGES
    v = v_smem.index(stage).reshape([SIZE, HEAD_DIM])
    ds = _score_gradient(
        s, do, v, v_full.index(stage), v_empty.index(stage), (done // STAGES) & 1, zero, lse2, delta,
        scale_log2, q.dtype, OPERAND,
    )  # fmt: skip
    done += 1
    after = done % STAGES
    mbarrier.wait(k_full.index(after), (done // STAGES) & 1)
    k = k_smem.index(after).reshape([SIZE, HEAD_DIM])
    s_token = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    k = k_smem.index(stage).reshape([SIZE, HEAD_DIM])
    dq_token = warpgroup_mma(ds, k, dq, is_async=True)
    if COLUMN:
        bias = column_bias(word, SIZE)
    s, dq, ds = warpgroup_mma_wait(0, deps=[s_token, dq_token, ds])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if COLUMN:
        s = hide_columns(s, bias, t, columns, whole, position, capacity, W, SIZE)
    return s, dq, done


@gluon.jit
def _consumer(
    q_smem, do_smem, q_full, q_empty, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    numbers, number_full, number_empty, dq_desc, prev_ptr, dq_ptr, lse_ptr, delta_ptr, items, n_rows, heads,
    entries, bounds, row_blocks, col_blocks, n_cols, diagonal, columns, words, before, upto, capacity, words_row,
    dq_b, dq_h, scale,
    dq_r: gl.constexpr, W: gl.constexpr, HAS_PREV: gl.constexpr, FINAL: gl.constexpr, TOEPLITZ: gl.constexpr,
    COLUMNS: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of 64 queries of each block, added to the previous one if HAS_PREV."""
    HALF: gl.constexpr = SIZE // 2
    S_MMA: gl.constexpr = product_layout(SIZE)
    O_MMA: gl.constexpr = product_layout(HEAD_DIM)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, O_MMA, 2)
    q = q_smem.index(W).reshape([HALF, HEAD_DIM])
    do = do_smem.index(W).reshape([HALF, HEAD_DIM])
    scale_log2 = scale * LOG2E
    done = 0
    number = 0
    turn = 0
    item = taken(turn, numbers, number_full, number_empty)
    while item < items:
        batch, head, bh, i, tile_steps, _, _, own, column_steps, column_row, bits, whole, position = visits_of(
            item, n_rows, heads, entries, bounds, row_blocks, col_blocks, n_cols, diagonal, columns, words, before,
            upto, capacity, words_row, TOEPLITZ, COLUMNS, SIZE,
        )  # fmt: skip
        steps = column_steps + tile_steps
        if steps > 0 or FINAL or not HAS_PREV:
            first_row = i * SIZE + W * HALF
            stat = bh * n_rows * SIZE + first_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, S_MMA))
            lse2 = gl.load(lse_ptr + stat)
            delta = gl.load(delta_ptr + stat)
            zero = gl.zeros([HALF, SIZE], gl.float32, S_MMA)
            dq = gl.zeros([HALF, HEAD_DIM], gl.float32, O_MMA)
            mbarrier.wait(q_full.index(0), number & 1)
            if steps > 0:
                stage = done % STAGES
                mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
                k = k_smem.index(stage).reshape([SIZE, HEAD_DIM])
                s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False)
                if COLUMNS:
                    word = hidden_word(bits, 0, column_steps, SIZE)
                else:
                    word = 0
                s = hide_first(
                    s, tile_steps, own, word, column_row, whole, position, capacity, W, COLUMNS, SIZE
                )
                for t in range(1, tile_steps):
                    s, dq, done = _step(
                        s, dq, done, word, column_row, whole, position, t, capacity, lse2, delta, scale_log2,
                        q, do, zero, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                        W, False, SIZE, HEAD_DIM, STAGES, OPERAND,
                    )  # fmt: skip
                if COLUMNS:
                    first = gl.where(tile_steps > 0, 0, 1)
                    word = hidden_word(bits, first, column_steps, SIZE)
                    for t in range(first, column_steps):
                        this, word = (
                            word,
                            hidden_word(bits, t + 1, column_steps, SIZE),
                        )  # a step ahead of its use
                        s, dq, done = _step(
                            s, dq, done, this, column_row, whole, position, t, capacity, lse2, delta, scale_log2,
                            q, do, zero, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                            W, True, SIZE, HEAD_DIM, STAGES, OPERAND,
                        )  # fmt: skip
                stage = done % STAGES
                v = v_smem.index(stage).reshape([SIZE, HEAD_DIM])
                ds = _score_gradient(
                    s, do, v, v_full.index(stage), v_empty.index(stage), (done // STAGES) & 1, zero, lse2, delta,
                    scale_log2, q_smem.dtype, OPERAND,
                )  # fmt: skip
                if not FINAL:
                    mbarrier.arrive(
                        q_empty.index(0), count=1
                    )  # the next block's may come while this one ends
                dq = warpgroup_mma(ds, k_smem.index(stage).reshape([SIZE, HEAD_DIM]), dq)
                mbarrier.arrive(k_empty.index(stage), count=1)
                done += 1
            else:
                if not FINAL:
                    mbarrier.arrive(q_empty.index(0), count=1)
            at = batch.to(gl.int64) * dq_b + head.to(gl.int64) * dq_h + first_row.to(gl.int64) * dq_r
            lane = gl.arange(0, HALF, layout=gl.SliceLayout(1, O_MMA))
            lanes = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_MMA))
            offsets = lane[:, None] * dq_r + lanes[None, :]
            dq = dq * scale
            if HAS_PREV:
                dq += gl.load(prev_ptr + at + offsets)
            if FINAL:  # 2-byte elements leave in whole lines, through the room of the queries
                q.store(dq.to(q_smem.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(dq_desc, [batch, first_row, head, 0], q_smem.index(W))
                tma.store_wait(0)
                mbarrier.arrive(q_empty.index(0), count=1)
            else:
                gl.store(dq_ptr + at + offsets, dq)
            number += 1
        turn += 1
        item = taken(turn, numbers, number_full, number_empty)


@gluon.jit(do_not_specialize=["items", "n_rows", "heads", "n_cols", "diagonal", "capacity", "words_row"])
def query_gradient_kernel(
    q_desc, do_desc, k_desc, v_desc, ck_desc, cv_desc, dq_desc, prev_ptr, dq_ptr, lse_ptr, delta_ptr, counter,
    entries, bounds, row_blocks, col_blocks, columns, words, before, upto, dq_b, dq_r: gl.constexpr, dq_h,
    scale, items, n_rows, heads, n_cols, diagonal, capacity, words_row,
    HAS_PREV: gl.constexpr, FINAL: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr,
    GROUP: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of every block of queries over its columns, if there are any (COLUMNS), and its slash tiles.

    counter: int32 (1,), 0; lists as in ``tile_part`` and ``column_part``; lse in units of log2, 0 for rows that see
    nothing.
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], q_desc.layout)
    do = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], q_desc.layout)
    q_full, q_empty = barriers(1, 1), barriers(1, 2)
    k, v, k_full, k_empty, v_full, v_empty = key_buffers(k_desc, v_desc, SIZE, HEAD_DIM, STAGES)
    numbers, number_full, number_empty = desk()
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q, do, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty, numbers, number_full, number_empty,
                    dq_desc, prev_ptr, dq_ptr, lse_ptr, delta_ptr, items, n_rows, heads,
                    entries, bounds, row_blocks, col_blocks, n_cols, diagonal, columns, words, before, upto, capacity,
                    words_row, dq_b, dq_h, scale,
                    dq_r, 0, HAS_PREV, FINAL, TOEPLITZ, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    q, do, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty, numbers, number_full, number_empty,
                    dq_desc, prev_ptr, dq_ptr, lse_ptr, delta_ptr, items, n_rows, heads,
                    entries, bounds, row_blocks, col_blocks, n_cols, diagonal, columns, words, before, upto, capacity,
                    words_row, dq_b, dq_h, scale,
                    dq_r, 1, HAS_PREV, FINAL, TOEPLITZ, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                producer,
                (
                    q_desc, do_desc, k_desc, v_desc, ck_desc, cv_desc, q, do, q_full, q_empty, k, v,
                    k_full, k_empty, v_full, v_empty, numbers, number_full, number_empty, counter, items, n_rows, heads,
                    entries, bounds, row_blocks, col_blocks, n_cols, diagonal, columns, words, before, upto, capacity,
                    words_row, True, HAS_PREV and not FINAL, TOEPLITZ, COLUMNS, GROUP, SIZE, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
