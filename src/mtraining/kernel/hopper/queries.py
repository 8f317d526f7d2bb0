"""Query-major gradients on Hopper: dQ of slash tiles and columns (hopper/common.py; hopper/keys.py has dK and dV).

There are no atomics, and every sum runs in a fixed order. Within a step only the product of dout and the values runs
under the exponentials. The next tile's scores are multiplied beside this tile's gradients, and all products end before
the step does. Products in flight across the end of a loop would have to be copied, and the assembler then waits for
each one.
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
    Keys,
    barriers,
    column_bias,
    hidden_word,
    hide_before,
    hide_columns,
    key_buffers,
    product_layout,
)
from mtraining.kernel.hopper.copies import send_tile
from mtraining.kernel.hopper.items import (
    ColumnLists,
    Queries,
    Queue,
    Sources,
    Target,
    Visit,
    Work,
    hide_first,
    job_queue,
    producer,
    slash_key,
    taken,
    visit_of,
)
from mtraining.kernel.triton.common import RowLists


@gluon.jit
def _score_gradient(s, done, do, zero, lse2, delta, scale_log2, keys: Keys, constants: gl.constexpr):
    """Gradient of scores ``s`` [64, SIZE] of tile number ``done``, as the left operand of dQ [64, SIZE].

    do [64, HEAD_DIM] in shared memory, lse2 and delta [64].
    """
    stage = done % constants.STAGES
    v = keys.v.index(stage).reshape([constants.SIZE, constants.HEAD_DIM])
    full, empty = keys.v_full.index(stage), keys.v_empty.index(stage)
    mbarrier.wait(full, (done // constants.STAGES) & 1)
    token = warpgroup_mma(do, v.permute((1, 0)), zero, use_acc=False, is_async=True)
    weights = gl.exp2(s * scale_log2 - lse2[:, None])
    dweights = warpgroup_mma_wait(0, deps=[token])
    mbarrier.arrive(empty, count=1)
    operand: gl.constexpr = gl.DotOperandLayout(0, product_layout(constants.HEAD_DIM), 2)
    return gl.convert_layout((weights * (dweights - delta[:, None])).to(do.dtype), operand)


@gluon.jit
def _step(
    s, dq, done, t, word, visit: Visit, lse2, delta, scale_log2, q, do, zero, keys: Keys,
    W: gl.constexpr, COLUMN: gl.constexpr, constants: gl.constexpr,
):  # fmt: skip
    """dQ of tile number ``done``, whose scores are ``s``, and the scores of the next one.

    COLUMN: the next one is tile ``t`` of the columns, with the hidden bits ``word``. Else it is slash tile ``t``, which
    is not on the causal diagonal.
    """
    SIZE: gl.constexpr = constants.SIZE
    HEAD_DIM: gl.constexpr = constants.HEAD_DIM
    ds = _score_gradient(s, done, do, zero, lse2, delta, scale_log2, keys, constants)
    stage = done % constants.STAGES
    done += 1
    after = done % constants.STAGES
    # Both products under way: q k^T of the next tile, ds k of this one.
    mbarrier.wait(keys.k_full.index(after), (done // constants.STAGES) & 1)
    k = keys.k.index(after).reshape([SIZE, HEAD_DIM])
    s_token = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    k = keys.k.index(stage).reshape([SIZE, HEAD_DIM])
    dq_token = warpgroup_mma(ds, k, dq, is_async=True)
    if COLUMN:
        bias = column_bias(word, SIZE)  # [SIZE]
    elif constants.STARTS:
        key = slash_key(visit, t, constants)
    s, dq, ds = warpgroup_mma_wait(0, deps=[s_token, dq_token, ds])
    mbarrier.arrive(keys.k_empty.index(stage), count=1)
    if COLUMN:
        s = hide_columns(s, bias, t, visit.columns, W, constants)
    elif constants.STARTS:
        s = hide_before(s, key, visit.reach, W, SIZE)
    return s, dq, done


@gluon.jit
def _consumer(
    queries: Queries, keys: Keys, queue: Queue, dq_desc, out: Target, lse_ptr, delta_ptr, work: Work, scale,
    W: gl.constexpr, constants: gl.constexpr,
):  # fmt: skip
    """dq of 64 queries of each block, added to the previous one if HAS_PREV."""
    SIZE: gl.constexpr = constants.SIZE
    HEAD_DIM: gl.constexpr = constants.HEAD_DIM
    HAS_PREV: gl.constexpr = constants.HAS_PREV
    FINAL: gl.constexpr = constants.FINAL
    COLUMNS: gl.constexpr = constants.COLUMNS
    HALF: gl.constexpr = SIZE // 2
    S_MMA: gl.constexpr = product_layout(SIZE)
    O_MMA: gl.constexpr = product_layout(HEAD_DIM)
    q = queries.q.index(W).reshape([HALF, HEAD_DIM])
    do = queries.do.index(W).reshape([HALF, HEAD_DIM])
    scale_log2 = scale * LOG2E
    done = 0
    number = 0
    turn = 0
    item = taken(turn, queue)
    while item < work.items:
        visit = visit_of(item, work, constants)
        steps = visit.columns.steps + visit.tile_steps
        if steps > 0 or FINAL or not HAS_PREV:
            first_row = visit.block * SIZE + W * HALF
            stat = (
                visit.bh * work.n_rows * SIZE
                + first_row
                + gl.arange(0, HALF, layout=gl.SliceLayout(1, S_MMA))
            )
            lse2 = gl.load(lse_ptr + stat)  # [64]
            delta = gl.load(delta_ptr + stat)  # [64]
            zero = gl.zeros([HALF, SIZE], gl.float32, S_MMA)
            dq = gl.zeros([HALF, HEAD_DIM], gl.float32, O_MMA)
            mbarrier.wait(queries.full.index(0), number & 1)
            if steps > 0:
                # Prologue: scores of the first tile.
                stage = done % constants.STAGES
                mbarrier.wait(keys.k_full.index(stage), (done // constants.STAGES) & 1)
                k = keys.k.index(stage).reshape([SIZE, HEAD_DIM])
                s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False)  # [64, SIZE]
                if COLUMNS:
                    word = hidden_word(visit.columns, 0, SIZE)
                else:
                    word = 0
                s = hide_first(s, word, visit, W, constants)

                # Steady state: gradients of a tile beside scores of the next, slash tiles first, then columns.
                for t in range(1, visit.tile_steps):
                    s, dq, done = _step(
                        s, dq, done, t, word, visit, lse2, delta, scale_log2, q, do, zero, keys,
                        W, False, constants,
                    )  # fmt: skip
                if COLUMNS:
                    first = gl.where(visit.tile_steps > 0, 0, 1)
                    word = hidden_word(visit.columns, first, SIZE)
                    for t in range(first, visit.columns.steps):
                        # Words are loaded a step ahead of their use.
                        this, word = word, hidden_word(visit.columns, t + 1, SIZE)
                        s, dq, done = _step(
                            s, dq, done, t, this, visit, lse2, delta, scale_log2, q, do, zero, keys,
                            W, True, constants,
                        )  # fmt: skip

                # Drain: gradients of the last tile.
                ds = _score_gradient(s, done, do, zero, lse2, delta, scale_log2, keys, constants)
                # The next block's queries may come while this block ends.
                if not FINAL:
                    mbarrier.arrive(queries.empty.index(0), count=1)
                stage = done % constants.STAGES
                dq = warpgroup_mma(ds, keys.k.index(stage).reshape([SIZE, HEAD_DIM]), dq)
                mbarrier.arrive(keys.k_empty.index(stage), count=1)
                done += 1
            else:
                if not FINAL:
                    mbarrier.arrive(queries.empty.index(0), count=1)

            # Epilogue: scale, add and write.
            at = (
                visit.batch.to(gl.int64) * out.batch
                + visit.head.to(gl.int64) * out.head
                + first_row.to(gl.int64) * out.row
            )
            lane = gl.arange(0, HALF, layout=gl.SliceLayout(1, O_MMA))
            lanes = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_MMA))
            offsets = lane[:, None] * out.row + lanes[None, :]  # [64, HEAD_DIM]
            dq = dq * scale
            if HAS_PREV:
                dq += gl.load(out.previous + at + offsets)
            # Elements of 2 bytes leave in whole lines, through the room of the queries.
            if FINAL:
                q.store(dq.to(queries.q.dtype))
                fence_async_shared()
                send_tile(dq_desc, [visit.batch, first_row, visit.head, 0], queries.q.index(W))
                tma.store_wait(0)
                mbarrier.arrive(queries.empty.index(0), count=1)
            else:
                gl.store(out.result + at + offsets, dq)
            number += 1
        turn += 1
        item = taken(turn, queue)


@gluon.jit(do_not_specialize=["items", "n_rows", "heads", "n_cols", "diagonal", "capacity", "words_row"])
def query_gradient_kernel(
    q_desc, do_desc, k_desc, v_desc, ck_desc, cv_desc, dq_desc, out: Target, lse_ptr, delta_ptr, counter,
    tiles: RowLists, columns: ColumnLists, scale, items, n_rows, heads, n_cols, diagonal, capacity, words_row,
    constants: gl.constexpr,
):  # fmt: skip
    """dq of every block of queries over its slash tiles and, if there are any (COLUMNS), its columns.

    counter: int32 (1,), 0; lse in units of log2, 0 for rows that see nothing.
    """
    SIZE: gl.constexpr = constants.SIZE
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, constants.HEAD_DIM], q_desc.layout)
    do = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, constants.HEAD_DIM], q_desc.layout)
    queries = Queries(q, do, barriers(1, 1), barriers(1, 2))
    keys = key_buffers(k_desc, v_desc, SIZE, constants.HEAD_DIM, constants.STAGES)
    queue = job_queue()
    sources = Sources(q_desc, do_desc, k_desc, v_desc, ck_desc, cv_desc)
    work = Work(items, n_rows, heads, tiles, n_cols, diagonal, columns, capacity, words_row)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (queries, keys, queue, dq_desc, out, lse_ptr, delta_ptr, work, scale, 0, constants)),
            (_consumer, (queries, keys, queue, dq_desc, out, lse_ptr, delta_ptr, work, scale, 1, constants)),
            (producer, (sources, queries, keys, queue, counter, work, True, constants)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
