"""Forward on Hopper: slash tiles and columns, by the same groups of warps (``hopper_common``).

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

from mtraining.kernel.hopper_common import (
    LN2,
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
    query_item,
    softmax_weights,
    visited_keys,
)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty,
    items, n_rows, heads, a, b, c, d, e, n, m,
    IN_PLACE: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    done = 0
    number = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head, i, steps, _, row, origin, _, _, _ = query_item(
            item, n_rows, heads, a, b, c, d, e, n, m, TOEPLITZ, COLUMNS, SIZE
        )
        if steps > 0 or not IN_PLACE:
            for t in range(0, gl.maximum(steps, 1)):
                if t < steps:
                    start = visited_keys(t, row, origin, TOEPLITZ, COLUMNS, SIZE)
                    fetch_keys(
                        done + t, start, batch, head // GROUP, k_desc, v_desc, k, v, k_full, k_empty, v_full, v_empty,
                        STAGES,
                    )  # fmt: skip
                if t == 0:  # the keys first: the room of the queries is free last
                    mbarrier.wait(q_empty.index(0), (number & 1) ^ 1)
                    mbarrier.expect(q_full.index(0), 2 * q_desc.block_type.nbytes)
                    fetch_halves(q_desc, batch, i * SIZE, head, q_full.index(0), q, SIZE // 2)
            done += steps
            number += 1


@gluon.jit
def _consumer(
    q_smem, q_full, q_empty, k_smem, v_smem, k_full, k_empty, v_full, v_empty, out_desc, prev_ptr, out_ptr, lse_ptr,
    items, n_rows, heads, a, b, c, d, e, n, m, o_b, o_h, scale_log2,
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
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head, i, steps, own, row, _, words, whole, position = query_item(
            item, n_rows, heads, a, b, c, d, e, n, m, TOEPLITZ, COLUMNS, SIZE
        )
        if steps > 0 or FINAL or not HAS_PREV:
            first_row = i * SIZE + W * HALF
            at = batch.to(gl.int64) * o_b + head.to(gl.int64) * o_h + first_row.to(gl.int64) * o_r
            lane = gl.arange(0, HALF, layout=O_ROW)
            offsets = lane[:, None] * o_r + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_MMA))[None, :]
            lse_ptrs = lse_ptr + (batch * heads + head).to(gl.int64) * n_rows * SIZE + first_row
            lse_ptrs += gl.arange(0, HALF, layout=S_ROW)
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
                    word = hidden_word(words, 0, steps, SIZE)
                    s = hide_columns(s, column_bias(word, SIZE), 0, row, whole, position, n, W, SIZE)
                else:
                    s = hide_after(s, own, W, SIZE)
                weights, alpha, top, total = softmax_weights(s, top, total, scale_log2, COLUMNS)
                acc = acc * gl.convert_layout(alpha, O_ROW)[:, None]
                p = gl.convert_layout(weights.to(q_smem.dtype), WEIGHTS)
                if COLUMNS:
                    word = hidden_word(words, 1, steps, SIZE)
                for t in range(1, steps):
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
                    if COLUMNS:
                        bias = column_bias(word, SIZE)
                        word = hidden_word(words, t + 1, steps, SIZE)  # a step ahead of its use
                    s = warpgroup_mma_wait(1, deps=[s_token])
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    if COLUMNS:
                        s = hide_columns(s, bias, t, row, whole, position, n, W, SIZE)
                    weights, alpha, top, total = softmax_weights(s, top, total, scale_log2, COLUMNS)
                    acc, p = warpgroup_mma_wait(0, deps=[acc_token, p])
                    mbarrier.arrive(v_empty.index(before), count=1)
                    acc = acc * gl.convert_layout(alpha, O_ROW)[:, None]
                    p = gl.convert_layout(weights.to(q_smem.dtype), WEIGHTS)
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


@gluon.jit(do_not_specialize=["items", "n_rows", "heads", "n", "m"])
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, prev_ptr, out_ptr, lse_ptr, a, b, c, d, e, o_b, o_r: gl.constexpr, o_h,
    scale, items, n_rows, heads, n, m,
    HAS_PREV: gl.constexpr, FINAL: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr,
    SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every block of queries over its slash tiles or, COLUMNS, over compact keys and values; see ``query_item``."""
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], q_desc.layout)
    q_full, q_empty = barriers(1, 1), barriers(1, 2)
    k, v, k_full, k_empty, v_full, v_empty = key_buffers(k_desc, v_desc, SIZE, HEAD_DIM, STAGES)
    fence_async_shared()
    scale_log2 = scale * LOG2E
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty, out_desc, prev_ptr, out_ptr, lse_ptr,
                    items, n_rows, heads, a, b, c, d, e, n, m, o_b, o_h, scale_log2,
                    o_r, 0, HAS_PREV, FINAL, TOEPLITZ, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    q, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty, out_desc, prev_ptr, out_ptr, lse_ptr,
                    items, n_rows, heads, a, b, c, d, e, n, m, o_b, o_h, scale_log2,
                    o_r, 1, HAS_PREV, FINAL, TOEPLITZ, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, q, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty,
                    items, n_rows, heads, a, b, c, d, e, n, m,
                    HAS_PREV and not FINAL, TOEPLITZ, COLUMNS, GROUP, SIZE, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
