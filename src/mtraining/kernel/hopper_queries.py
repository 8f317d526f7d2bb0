"""Query-major gradients on Hopper: dQ of slash tiles and of columns (``hopper_common``; ``hopper_keys`` has dK and dV).

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
    query_item,
    visited_keys,
)


@gluon.jit
def _producer(
    q_desc, do_desc, k_desc, v_desc, q, do, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty,
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
            mbarrier.wait(q_empty.index(0), (number & 1) ^ 1)
            mbarrier.expect(q_full.index(0), 4 * q_desc.block_type.nbytes)
            fetch_halves(q_desc, batch, i * SIZE, head, q_full.index(0), q, SIZE // 2)
            fetch_halves(do_desc, batch, i * SIZE, head, q_full.index(0), do, SIZE // 2)
            for t in range(0, steps):
                start = visited_keys(t, row, origin, TOEPLITZ, COLUMNS, SIZE)
                fetch_keys(
                    done + t, start, batch, head // GROUP, k_desc, v_desc, k, v, k_full, k_empty, v_full, v_empty,
                    STAGES,
                )  # fmt: skip
            done += steps
            number += 1


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
def _consumer(
    q_smem, do_smem, q_full, q_empty, k_smem, v_smem, k_full, k_empty, v_full, v_empty, dq_ptr, lse_ptr, delta_ptr,
    items, n_rows, heads, a, b, c, d, e, n, m, dq_b, dq_h, scale,
    dq_r: gl.constexpr, W: gl.constexpr, ADD: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr,
    SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of 64 queries of each block, added to what is there if ADD."""
    HALF: gl.constexpr = SIZE // 2
    S_MMA: gl.constexpr = product_layout(SIZE)
    O_MMA: gl.constexpr = product_layout(HEAD_DIM)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, O_MMA, 2)
    dtype: gl.constexpr = q_smem.dtype
    q = q_smem.index(W).reshape([HALF, HEAD_DIM])
    do = do_smem.index(W).reshape([HALF, HEAD_DIM])
    scale_log2 = scale * LOG2E
    done = 0
    number = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        batch, head, i, steps, own, row, _, words, whole, position = query_item(
            item, n_rows, heads, a, b, c, d, e, n, m, TOEPLITZ, COLUMNS, SIZE
        )
        if steps > 0 or not ADD:
            first_row = i * SIZE + W * HALF
            stat = (batch * heads + head).to(gl.int64) * n_rows * SIZE + first_row
            stat += gl.arange(0, HALF, layout=gl.SliceLayout(1, S_MMA))
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
                    word = hidden_word(words, 0, steps, SIZE)
                    s = hide_columns(s, column_bias(word, SIZE), 0, row, whole, position, n, W, SIZE)
                    word = hidden_word(words, 1, steps, SIZE)
                else:
                    s = hide_after(s, own, W, SIZE)
                for t in range(1, steps):
                    stage = done % STAGES
                    v = v_smem.index(stage).reshape([SIZE, HEAD_DIM])
                    ds = _score_gradient(
                        s, do, v, v_full.index(stage), v_empty.index(stage), (done // STAGES) & 1, zero, lse2, delta,
                        scale_log2, dtype, OPERAND,
                    )  # fmt: skip
                    done += 1
                    after = done % STAGES
                    mbarrier.wait(k_full.index(after), (done // STAGES) & 1)
                    k = k_smem.index(after).reshape([SIZE, HEAD_DIM])
                    s_token = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
                    k = k_smem.index(stage).reshape([SIZE, HEAD_DIM])
                    dq_token = warpgroup_mma(ds, k, dq, is_async=True)
                    if COLUMNS:
                        bias = column_bias(word, SIZE)
                        word = hidden_word(words, t + 1, steps, SIZE)  # a step ahead of its use
                    s, dq, ds = warpgroup_mma_wait(0, deps=[s_token, dq_token, ds])
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    if COLUMNS:
                        s = hide_columns(s, bias, t, row, whole, position, n, W, SIZE)
                stage = done % STAGES
                v = v_smem.index(stage).reshape([SIZE, HEAD_DIM])
                ds = _score_gradient(
                    s, do, v, v_full.index(stage), v_empty.index(stage), (done // STAGES) & 1, zero, lse2, delta,
                    scale_log2, dtype, OPERAND,
                )  # fmt: skip
                mbarrier.arrive(q_empty.index(0), count=1)  # the next block's may come while this one ends
                dq = warpgroup_mma(ds, k_smem.index(stage).reshape([SIZE, HEAD_DIM]), dq)
                mbarrier.arrive(k_empty.index(stage), count=1)
                done += 1
            else:
                mbarrier.arrive(q_empty.index(0), count=1)
            at = batch.to(gl.int64) * dq_b + head.to(gl.int64) * dq_h + first_row.to(gl.int64) * dq_r
            lane = gl.arange(0, HALF, layout=gl.SliceLayout(1, O_MMA))
            lanes = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_MMA))
            ptrs = dq_ptr + at + lane[:, None] * dq_r + lanes[None, :]
            dq = dq * scale
            if ADD:
                dq += gl.load(ptrs)
            gl.store(ptrs, dq)
            number += 1


@gluon.jit(do_not_specialize=["items", "n_rows", "heads", "n", "m"])
def query_gradient_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_ptr, lse_ptr, delta_ptr, a, b, c, d, e, dq_b, dq_r: gl.constexpr, dq_h,
    scale, items, n_rows, heads, n, m,
    ADD: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, GROUP: gl.constexpr, SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of every block of queries over its slash tiles or, COLUMNS, over compact keys and values (``query_item``).

    lse in units of log2, 0 for rows that see nothing.
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], q_desc.layout)
    do = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], q_desc.layout)
    q_full, q_empty = barriers(1, 1), barriers(1, 2)
    k, v, k_full, k_empty, v_full, v_empty = key_buffers(k_desc, v_desc, SIZE, HEAD_DIM, STAGES)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q, do, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty, dq_ptr, lse_ptr, delta_ptr,
                    items, n_rows, heads, a, b, c, d, e, n, m, dq_b, dq_h, scale,
                    dq_r, 0, ADD, TOEPLITZ, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    q, do, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty, dq_ptr, lse_ptr, delta_ptr,
                    items, n_rows, heads, a, b, c, d, e, n, m, dq_b, dq_h, scale,
                    dq_r, 1, ADD, TOEPLITZ, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, do_desc, k_desc, v_desc, q, do, q_full, q_empty, k, v, k_full, k_empty, v_full, v_empty,
                    items, n_rows, heads, a, b, c, d, e, n, m, ADD, TOEPLITZ, COLUMNS, GROUP, SIZE, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
