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
    softmax_weights,
)
from mtraining.kernel.triton_common import tile_row, tile_slot


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q, q_full, k, v, k_full, k_empty, v_full, v_empty, batch, head, kv_head, first_row,
    row, origin, steps,
    TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(q_full.index(0), 2 * q_desc.block_type.nbytes)
    fetch_halves(q_desc, batch, first_row, head, q_full.index(0), q, SIZE // 2)
    for t in range(0, steps):
        if COLUMNS:
            start = t * SIZE
        else:
            start = tile_slot(gl.load(row + t), origin, TOEPLITZ, False).to(gl.int32) * SIZE
        fetch_keys(t, start, batch, kv_head, k_desc, v_desc, k, v, k_full, k_empty, v_full, v_empty, STAGES)


@gluon.jit
def _consumer(
    q_smem, q_full, k_smem, v_smem, k_full, k_empty, v_full, v_empty, prev_base, out_base, lse_base,
    out_desc, batch, head, first_row, steps, own, words, columns, whole, position, capacity, scale_log2,
    o_r: gl.constexpr, W: gl.constexpr, HAS_PREV: gl.constexpr, FINAL: gl.constexpr, COLUMNS: gl.constexpr,
    SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(out, lse) of 64 queries, going on from the previous partial result if HAS_PREV."""
    HALF: gl.constexpr = SIZE // 2
    S_MMA: gl.constexpr = product_layout(SIZE)
    O_MMA: gl.constexpr = product_layout(HEAD_DIM)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, O_MMA, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_MMA)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_MMA)
    lane = W * HALF + gl.arange(0, HALF, layout=O_ROW)
    offsets = lane[:, None] * o_r + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_MMA))[None, :]
    lse_ptrs = lse_base + W * HALF + gl.arange(0, HALF, layout=S_ROW)
    if HAS_PREV:
        acc = gl.load(prev_base + offsets)
        top = gl.load(lse_ptrs) * LOG2E
        total = gl.where(top == float("-inf"), 0.0, 1.0)
    else:
        acc = gl.zeros([HALF, HEAD_DIM], gl.float32, O_MMA)
        top = gl.full([HALF], float("-inf"), gl.float32, S_ROW)
        total = gl.zeros([HALF], gl.float32, S_ROW)
    zero = gl.zeros([HALF, SIZE], gl.float32, S_MMA)

    mbarrier.wait(q_full.index(0), 0)
    q = q_smem.index(W).reshape([HALF, HEAD_DIM])
    if steps > 0:
        mbarrier.wait(k_full.index(0), 0)
        k = k_smem.index(0).reshape([SIZE, HEAD_DIM])
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False)
        mbarrier.arrive(k_empty.index(0), count=1)
        if COLUMNS:
            word = hidden_word(words, 0, steps, SIZE)
            s = hide_columns(s, column_bias(word, SIZE), 0, columns, whole, position, capacity, W, SIZE)
        else:
            s = hide_after(s, own, W, SIZE)
        weights, alpha, top, total = softmax_weights(s, top, total, scale_log2, COLUMNS)
        acc = acc * gl.convert_layout(alpha, O_ROW)[:, None]
        p = gl.convert_layout(weights.to(q_smem.dtype), WEIGHTS)
        if COLUMNS:
            word = hidden_word(words, 1, steps, SIZE)
        for t in range(1, steps):
            stage = t % STAGES
            before = (t - 1) % STAGES
            k = k_smem.index(stage).reshape([SIZE, HEAD_DIM])
            v = v_smem.index(before).reshape([SIZE, HEAD_DIM])
            mbarrier.wait(k_full.index(stage), (t // STAGES) & 1)
            s_token = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((t - 1) // STAGES) & 1)
            acc_token = warpgroup_mma(p, v, acc, is_async=True)
            if COLUMNS:
                bias = column_bias(word, SIZE)
                word = hidden_word(words, t + 1, steps, SIZE)  # a step ahead of its use
            s = warpgroup_mma_wait(1, deps=[s_token])
            mbarrier.arrive(k_empty.index(stage), count=1)
            if COLUMNS:
                s = hide_columns(s, bias, t, columns, whole, position, capacity, W, SIZE)
            weights, alpha, top, total = softmax_weights(s, top, total, scale_log2, COLUMNS)
            acc, p = warpgroup_mma_wait(0, deps=[acc_token, p])
            mbarrier.arrive(v_empty.index(before), count=1)
            acc = acc * gl.convert_layout(alpha, O_ROW)[:, None]
            p = gl.convert_layout(weights.to(q_smem.dtype), WEIGHTS)
        last = (steps - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((steps - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_smem.index(last).reshape([SIZE, HEAD_DIM]), acc)

    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    acc = acc * gl.convert_layout(1.0 / total, O_ROW)[:, None]
    gl.store(lse_ptrs, gl.where(empty, float("-inf"), (top + gl.log2(total)) * LN2))
    if FINAL:  # 2-byte elements leave in whole lines, through the room of the queries
        q_smem.index(W).reshape([HALF, HEAD_DIM]).store(acc.to(q_smem.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [batch, first_row + W * HALF, head, 0], q_smem.index(W))
        tma.store_wait(0)
    else:
        gl.store(out_base + offsets, acc)


@gluon.jit
def _attend(
    q_desc, k_desc, v_desc, out_desc, prev_ptr, out_ptr, lse_ptr, o_b, o_r: gl.constexpr, o_h,
    batch, head, kv_head, heads, i, n_rows, row, origin, steps, own, words, columns, whole, position, capacity, scale,
    HAS_PREV: gl.constexpr, FINAL: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    first_row = i * SIZE
    at = batch.to(gl.int64) * o_b + head.to(gl.int64) * o_h + first_row.to(gl.int64) * o_r
    lse_base = lse_ptr + ((batch * heads + head).to(gl.int64) * n_rows + i) * SIZE
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, HEAD_DIM], q_desc.layout)
    q_full = barriers(1, 1)
    k, v, k_full, k_empty, v_full, v_empty = key_buffers(k_desc, v_desc, SIZE, HEAD_DIM, STAGES)
    fence_async_shared()
    scale_log2 = scale * LOG2E
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q, q_full, k, v, k_full, k_empty, v_full, v_empty, prev_ptr + at, out_ptr + at, lse_base, out_desc,
                    batch, head, first_row, steps, own, words, columns, whole, position, capacity, scale_log2,
                    o_r, 0, HAS_PREV, FINAL, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    q, q_full, k, v, k_full, k_empty, v_full, v_empty, prev_ptr + at, out_ptr + at, lse_base, out_desc,
                    batch, head, first_row, steps, own, words, columns, whole, position, capacity, scale_log2,
                    o_r, 1, HAS_PREV, FINAL, COLUMNS, SIZE, HEAD_DIM, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, q, q_full, k, v, k_full, k_empty, v_full, v_empty,
                    batch, head, kv_head, first_row, row, origin, steps, TOEPLITZ, COLUMNS, SIZE, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["kv_heads", "n_rows", "n_cols", "diagonal"])
def tiles_kernel(
    q_desc, k_desc, v_desc, out_desc, prev_ptr, out_ptr, lse_ptr, entries, bounds, row_blocks, col_blocks,
    o_b, o_r: gl.constexpr, o_h, scale, kv_heads, n_rows, n_cols, diagonal,
    HAS_PREV: gl.constexpr, FINAL: gl.constexpr, TOEPLITZ: gl.constexpr, GROUP: gl.constexpr, SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Slash tiles of one block of queries; lists as in ``triton_lists``."""
    pid = gl.program_id(0)
    i = n_rows - 1 - pid % n_rows  # the longest rows first
    head = (pid // n_rows) % (kv_heads * GROUP)
    batch = pid // n_rows // (kv_heads * GROUP)
    bh = (batch * kv_heads * GROUP + head).to(gl.int64)
    row, lo, hi, origin, own = tile_row(
        entries, bounds, row_blocks, col_blocks, bh, i, n_rows, n_cols, diagonal, TOEPLITZ, False
    )
    _attend(
        q_desc, k_desc, v_desc, out_desc, prev_ptr, out_ptr, lse_ptr, o_b, o_r, o_h,
        batch, head, head // GROUP, kv_heads * GROUP, i, n_rows, row + lo, origin, hi - lo, own,
        row, row, 0, 0, 0, scale, HAS_PREV, FINAL, TOEPLITZ, False, SIZE, HEAD_DIM, STAGES,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["heads", "n_rows", "capacity", "words_row"])
def columns_kernel(
    q_desc, k_desc, v_desc, out_desc, prev_ptr, out_ptr, lse_ptr, columns_ptr, words_ptr, q_blocks, before_ptr,
    upto_ptr,
    o_b, o_r: gl.constexpr, o_h, scale, heads, n_rows, capacity, words_row,
    HAS_PREV: gl.constexpr, FINAL: gl.constexpr, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Columns of one block of queries, from compact keys and values; tables as in ``triton_hidden``."""
    pid = gl.program_id(0)
    i = n_rows - 1 - pid % n_rows
    head = (pid // n_rows) % heads
    batch = pid // n_rows // heads
    bh = (batch * heads + head).to(gl.int64)
    upto = gl.load(upto_ptr + bh * n_rows + i)
    whole = gl.load(before_ptr + bh * n_rows + i) // SIZE
    words = words_ptr + (bh * n_rows + i) * words_row
    columns = columns_ptr + bh * capacity
    _attend(
        q_desc, k_desc, v_desc, out_desc, prev_ptr, out_ptr, lse_ptr, o_b, o_r, o_h,
        batch, head, head, heads, i, n_rows, columns, 0, gl.cdiv(upto, SIZE), 0, words, columns, whole,
        gl.load(q_blocks + i) * SIZE, capacity, scale, HAS_PREV, FINAL, False, True, SIZE, HEAD_DIM, STAGES,
    )  # fmt: skip
