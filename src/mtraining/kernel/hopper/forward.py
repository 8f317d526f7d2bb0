"""Forward on Hopper: slash tiles and columns of a block of queries, one after the other (hopper/common.py).

Within a group, the scores of the next tile are multiplied beside the values of this one, so that the exponentials of
one tile run under the products of another.
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
    LN2,
    LOG2E,
    barriers,
    column_bias,
    hidden_word,
    hide_columns,
    hide_first,
    key_buffers,
    product_layout,
    softmax_weights,
)
from mtraining.kernel.hopper.items import desk, producer, taken, visits_of


@gluon.jit
def _step(
    acc, p, top, total, done, word, columns, whole, position, t, capacity, scale_log2,
    q, zero, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    W: gl.constexpr, COLUMN: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, O_ROW: gl.constexpr, WEIGHTS: gl.constexpr,
):  # fmt: skip
    """Scores of a tile beside the values of the one before: a COLUMN tile, number ``t`` with the bits
    ``word``, or a slash tile that is not on the causal diagonal."""
    before = done % STAGES
    before_phase = (done // STAGES) & 1
    done += 1
    stage = done % STAGES
    k = k_smem.index(stage).reshape([SIZE, HEAD_DIM])
    v = v_smem.index(before).reshape([SIZE, HEAD_DIM])
    mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
    s_token = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), before_phase)
    acc_token = warpgroup_mma(p, v, acc, is_async=True)
    if COLUMN:
        bias = column_bias(word, SIZE)
    s = warpgroup_mma_wait(1, deps=[s_token])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if COLUMN:
        s = hide_columns(s, bias, t, columns, whole, position, capacity, W, SIZE)
    weights, alpha, top, total = softmax_weights(s, top, total, scale_log2, COLUMN)
    acc, p = warpgroup_mma_wait(0, deps=[acc_token, p])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, O_ROW)[:, None]
    p = gl.convert_layout(weights.to(q.dtype), WEIGHTS)
    return acc, p, top, total, done


@gluon.jit
def _consumer(
    q_smem, q_full, q_empty, k_smem, v_smem, k_full, k_empty, v_full, v_empty, numbers, number_full, number_empty,
    out_desc, prev_ptr, out_ptr, lse_ptr, items, n_rows, heads,
    entries, bounds, row_blocks, col_blocks, n_cols, diagonal, columns, words, before, upto, capacity, words_row,
    o_b, o_h, scale_log2,
    o_r: gl.constexpr, W: gl.constexpr, HAS_PREV: gl.constexpr, FINAL: gl.constexpr, TOEPLITZ: gl.constexpr,
    COLUMNS: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(out, lse) of 64 queries of each block, going on from the previous partial result if HAS_PREV."""
    HALF: gl.constexpr = SIZE // 2
    S_MMA: gl.constexpr = product_layout(SIZE)
    O_MMA: gl.constexpr = product_layout(HEAD_DIM)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, O_MMA, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_MMA)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_MMA)
    q = q_smem.index(W).reshape([HALF, HEAD_DIM])
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
            at = batch.to(gl.int64) * o_b + head.to(gl.int64) * o_h + first_row.to(gl.int64) * o_r
            lane = gl.arange(0, HALF, layout=O_ROW)
            offsets = lane[:, None] * o_r + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_MMA))[None, :]
            lse_ptrs = lse_ptr + bh * n_rows * SIZE + first_row + gl.arange(0, HALF, layout=S_ROW)
            if HAS_PREV:
                acc = gl.load(prev_ptr + at + offsets)
                top = gl.load(lse_ptrs) * LOG2E
                total = gl.where(top == float("-inf"), 0.0, 1.0)
            else:
                acc = gl.zeros([HALF, HEAD_DIM], gl.float32, O_MMA)
                top = gl.full([HALF], float("-inf"), gl.float32, S_ROW)
                total = gl.zeros([HALF], gl.float32, S_ROW)
            zero = gl.zeros([HALF, SIZE], gl.float32, S_MMA)
            mbarrier.wait(q_full.index(0), number & 1)
            if steps > 0:
                stage = done % STAGES
                mbarrier.wait(k_full.index(stage), (done // STAGES) & 1)
                k = k_smem.index(stage).reshape([SIZE, HEAD_DIM])
                s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False)
                mbarrier.arrive(k_empty.index(stage), count=1)
                if COLUMNS:
                    word = hidden_word(bits, 0, column_steps, SIZE)
                else:
                    word = 0
                s = hide_first(
                    s, tile_steps, own, word, column_row, whole, position, capacity, W, COLUMNS, SIZE
                )
                weights, alpha, top, total = softmax_weights(s, top, total, scale_log2, COLUMNS)
                acc = acc * gl.convert_layout(alpha, O_ROW)[:, None]
                p = gl.convert_layout(weights.to(q_smem.dtype), WEIGHTS)
                for t in range(1, tile_steps):
                    acc, p, top, total, done = _step(
                        acc, p, top, total, done, word, column_row, whole, position, t, capacity, scale_log2,
                        q, zero, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                        W, False, SIZE, HEAD_DIM, STAGES, O_ROW, WEIGHTS,
                    )  # fmt: skip
                if COLUMNS:
                    first = gl.where(tile_steps > 0, 0, 1)
                    word = hidden_word(bits, first, column_steps, SIZE)
                    for t in range(first, column_steps):
                        this, word = (
                            word,
                            hidden_word(bits, t + 1, column_steps, SIZE),
                        )  # a step ahead of its use
                        acc, p, top, total, done = _step(
                            acc, p, top, total, done, this, column_row, whole, position, t, capacity, scale_log2,
                            q, zero, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                            W, True, SIZE, HEAD_DIM, STAGES, O_ROW, WEIGHTS,
                        )  # fmt: skip
                last = done % STAGES
                mbarrier.wait(v_full.index(last), (done // STAGES) & 1)
                acc = warpgroup_mma(p, v_smem.index(last).reshape([SIZE, HEAD_DIM]), acc)
                mbarrier.arrive(v_empty.index(last), count=1)
                done += 1

            empty = total == 0.0
            total = gl.where(empty, 1.0, total)
            acc = acc * gl.convert_layout(1.0 / total, O_ROW)[:, None]
            gl.store(lse_ptrs, gl.where(empty, float("-inf"), (top + gl.log2(total)) * LN2))
            if FINAL:  # 2-byte elements leave in whole lines, through the room of the queries
                q.store(acc.to(q_smem.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(out_desc, [batch, first_row, head, 0], q_smem.index(W))
                tma.store_wait(0)
                mbarrier.arrive(q_empty.index(0), count=1)
            else:
                mbarrier.arrive(q_empty.index(0), count=1)
                gl.store(out_ptr + at + offsets, acc)
            number += 1
        turn += 1
        item = taken(turn, numbers, number_full, number_empty)


@gluon.jit(do_not_specialize=["items", "n_rows", "heads", "n_cols", "diagonal", "capacity", "words_row"])
def forward_kernel(
    q_desc, k_desc, v_desc, ck_desc, cv_desc, out_desc, prev_ptr, out_ptr, lse_ptr, counter,
    entries, bounds, row_blocks, col_blocks, columns, words, before, upto, o_b, o_r: gl.constexpr, o_h,
    scale, items, n_rows, heads, n_cols, diagonal, capacity, words_row,
    HAS_PREV: gl.constexpr, FINAL: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr,
    GROUP: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every block of queries over its columns, if there are any (COLUMNS), and its slash tiles.

    counter: int32 (1,), 0; lists as in ``tile_part`` and ``column_part``.
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], q_desc.layout)
    q_full, q_empty = barriers(1, 1), barriers(1, 2)
    k, v, k_full, k_empty, v_full, v_empty = key_buffers(k_desc, v_desc, SIZE, HEAD_DIM, STAGES)
    numbers, number_full, number_empty = desk()
    fence_async_shared()
    scale_log2 = scale * LOG2E
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty, numbers, number_full, number_empty,
                    out_desc, prev_ptr, out_ptr, lse_ptr, items, n_rows, heads, entries, bounds, row_blocks, col_blocks,
                    n_cols, diagonal, columns, words, before, upto, capacity, words_row, o_b, o_h, scale_log2,
                    o_r, 0, HAS_PREV, FINAL, TOEPLITZ, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    q, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty, numbers, number_full, number_empty,
                    out_desc, prev_ptr, out_ptr, lse_ptr, items, n_rows, heads, entries, bounds, row_blocks, col_blocks,
                    n_cols, diagonal, columns, words, before, upto, capacity, words_row, o_b, o_h, scale_log2,
                    o_r, 1, HAS_PREV, FINAL, TOEPLITZ, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                producer,
                (
                    q_desc, q_desc, k_desc, v_desc, ck_desc, cv_desc, q, q, q_full, q_empty, k, v,
                    k_full, k_empty, v_full, v_empty, numbers, number_full, number_empty, counter, items, n_rows, heads,
                    entries, bounds, row_blocks, col_blocks, n_cols, diagonal, columns, words, before, upto, capacity,
                    words_row, False, HAS_PREV and not FINAL, TOEPLITZ, COLUMNS, GROUP, SIZE, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
