"""Forward on Hopper: slash tiles and columns of a block of queries, one after the other (hopper/common.py).

Within a group, the scores of the next tile are multiplied beside the values of this one. The exponentials of one tile
then run under the products of another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    Keys,
    barriers,
    column_bias,
    hidden_word,
    hide_before,
    hide_columns,
    key_buffers,
    product_layout,
    softmax_weights,
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


class Running(NamedTuple):
    """A running softmax over 64 queries: ``acc`` lacks the values of the last tile, whose weights are ``p``.

    Attributes:
        acc: fp32 [64, HEAD_DIM], weighted values so far.
        p: [64, SIZE], the last tile's weights, as the left operand of its product with the values.
        top: fp32 [64], the largest score so far, in units of log2.
        total: fp32 [64], the sum of the weights so far, those of the last tile included.
    """

    acc: Any
    p: Any
    top: Any
    total: Any


@gluon.jit
def _step(
    running: Running, done, t, word, visit: Visit, scale_log2, q, zero, keys: Keys,
    W: gl.constexpr, COLUMN: gl.constexpr, constants: gl.constexpr,
):  # fmt: skip
    """Scores of tile number ``done + 1`` beside the values of number ``done``.

    COLUMN: it is tile ``t`` of the columns, with the hidden bits ``word``. Else it is slash tile ``t``, which is not on
    the causal diagonal.
    """
    SIZE: gl.constexpr = constants.SIZE
    HEAD_DIM: gl.constexpr = constants.HEAD_DIM
    O_MMA: gl.constexpr = product_layout(HEAD_DIM)
    before = done % constants.STAGES
    before_phase = (done // constants.STAGES) & 1
    done += 1
    stage = done % constants.STAGES
    k = keys.k.index(stage).reshape([SIZE, HEAD_DIM])
    v = keys.v.index(before).reshape([SIZE, HEAD_DIM])
    # Both products under way: q k^T of this tile, then p v of the one before.
    mbarrier.wait(keys.k_full.index(stage), (done // constants.STAGES) & 1)
    s_token = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(keys.v_full.index(before), before_phase)
    acc_token = warpgroup_mma(running.p, v, running.acc, is_async=True)
    if COLUMN:
        bias = column_bias(word, SIZE)  # [SIZE]
    elif constants.STARTS:
        key = slash_key(visit, t, constants)
    # The scores are there; the exponentials run under p v.
    s = warpgroup_mma_wait(1, deps=[s_token])  # [64, SIZE]
    mbarrier.arrive(keys.k_empty.index(stage), count=1)
    if COLUMN:
        s = hide_columns(s, bias, t, visit.columns, W, constants)
    elif constants.STARTS:
        s = hide_before(s, key, visit.reach, W, SIZE)
    weights, alpha, top, total = softmax_weights(
        s, running.top, running.total, scale_log2, COLUMN or constants.STARTS
    )
    # p v is there: scale it to the new maximum.
    acc, p = warpgroup_mma_wait(0, deps=[acc_token, running.p])
    mbarrier.arrive(keys.v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_MMA))[:, None]
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, O_MMA, 2))
    return Running(acc, p, top, total), done


@gluon.jit
def _consumer(
    queries: Queries, keys: Keys, queue: Queue, out_desc, out: Target, lse_ptr, work: Work, scale_log2,
    W: gl.constexpr, constants: gl.constexpr,
):  # fmt: skip
    """(out, lse) of 64 queries of each block, going on from the previous partial result if HAS_PREV."""
    SIZE: gl.constexpr = constants.SIZE
    HEAD_DIM: gl.constexpr = constants.HEAD_DIM
    HAS_PREV: gl.constexpr = constants.HAS_PREV
    FINAL: gl.constexpr = constants.FINAL
    COLUMNS: gl.constexpr = constants.COLUMNS
    HALF: gl.constexpr = SIZE // 2
    S_MMA: gl.constexpr = product_layout(SIZE)
    O_MMA: gl.constexpr = product_layout(HEAD_DIM)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, O_MMA, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_MMA)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_MMA)
    q = queries.q.index(W).reshape([HALF, HEAD_DIM])
    done = 0
    number = 0
    turn = 0
    item = taken(turn, queue)
    while item < work.items:
        visit = visit_of(item, work, constants)
        steps = visit.columns.steps + visit.tile_steps
        if steps > 0 or FINAL or not HAS_PREV:
            first_row = visit.block * SIZE + W * HALF
            at = (
                visit.batch.to(gl.int64) * out.batch
                + visit.head.to(gl.int64) * out.head
                + first_row.to(gl.int64) * out.row
            )
            lane = gl.arange(0, HALF, layout=O_ROW)
            # [64, HEAD_DIM]
            offsets = (
                lane[:, None] * out.row + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_MMA))[None, :]
            )
            lse_ptrs = lse_ptr + visit.bh * work.n_rows * SIZE + first_row + gl.arange(0, HALF, layout=S_ROW)
            if HAS_PREV:
                acc = gl.load(out.previous + at + offsets)  # [64, HEAD_DIM]
                top = gl.load(lse_ptrs) * LOG2E  # [64]
                total = gl.where(top == float("-inf"), 0.0, 1.0)  # [64]
            else:
                acc = gl.zeros([HALF, HEAD_DIM], gl.float32, O_MMA)
                top = gl.full([HALF], float("-inf"), gl.float32, S_ROW)
                total = gl.zeros([HALF], gl.float32, S_ROW)
            zero = gl.zeros([HALF, SIZE], gl.float32, S_MMA)
            mbarrier.wait(queries.full.index(0), number & 1)
            if steps > 0:
                # Prologue: scores and weights of the first tile. No values yet.
                stage = done % constants.STAGES
                mbarrier.wait(keys.k_full.index(stage), (done // constants.STAGES) & 1)
                k = keys.k.index(stage).reshape([SIZE, HEAD_DIM])
                s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False)  # [64, SIZE]
                mbarrier.arrive(keys.k_empty.index(stage), count=1)
                if COLUMNS:
                    word = hidden_word(visit.columns, 0, SIZE)
                else:
                    word = 0
                s = hide_first(s, word, visit, W, constants)
                weights, alpha, top, total = softmax_weights(
                    s, top, total, scale_log2, COLUMNS or constants.STARTS
                )
                acc = acc * gl.convert_layout(alpha, O_ROW)[:, None]
                p = gl.convert_layout(weights.to(queries.q.dtype), WEIGHTS)  # [64, SIZE]

                # Steady state: the other slash tiles, then the columns.
                running = Running(acc, p, top, total)
                for t in range(1, visit.tile_steps):
                    running, done = _step(
                        running, done, t, word, visit, scale_log2, q, zero, keys, W, False, constants
                    )
                if COLUMNS:
                    first = gl.where(visit.tile_steps > 0, 0, 1)
                    word = hidden_word(visit.columns, first, SIZE)
                    for t in range(first, visit.columns.steps):
                        # Words are loaded a step ahead of their use.
                        this, word = word, hidden_word(visit.columns, t + 1, SIZE)
                        running, done = _step(
                            running,
                            done,
                            t,
                            this,
                            visit,
                            scale_log2,
                            q,
                            zero,
                            keys,
                            W,
                            True,
                            constants,
                        )

                # Drain: the values of the last tile.
                last = done % constants.STAGES
                mbarrier.wait(keys.v_full.index(last), (done // constants.STAGES) & 1)
                acc = warpgroup_mma(running.p, keys.v.index(last).reshape([SIZE, HEAD_DIM]), running.acc)
                mbarrier.arrive(keys.v_empty.index(last), count=1)
                top, total = running.top, running.total
                done += 1

            # Epilogue: normalise and write.
            empty = total == 0.0
            total = gl.where(empty, 1.0, total)
            acc = acc * gl.convert_layout(1.0 / total, O_ROW)[:, None]
            gl.store(lse_ptrs, gl.where(empty, float("-inf"), (top + gl.log2(total)) * LN2))
            # Elements of 2 bytes leave in whole lines, through the room of the queries.
            if FINAL:
                q.store(acc.to(queries.q.dtype))
                fence_async_shared()
                send_tile(out_desc, [visit.batch, first_row, visit.head, 0], queries.q.index(W))
                tma.store_wait(0)
                mbarrier.arrive(queries.empty.index(0), count=1)
            else:
                mbarrier.arrive(queries.empty.index(0), count=1)
                gl.store(out.result + at + offsets, acc)
            number += 1
        turn += 1
        item = taken(turn, queue)


@gluon.jit(do_not_specialize=["items", "n_rows", "heads", "n_cols", "diagonal", "capacity", "words_row"])
def forward_kernel(
    q_desc, k_desc, v_desc, ck_desc, cv_desc, out_desc, out: Target, lse_ptr, counter, tiles: RowLists,
    columns: ColumnLists, scale, items, n_rows, heads, n_cols, diagonal, capacity, words_row, constants: gl.constexpr,
):  # fmt: skip
    """Every block of queries over its slash tiles and, if there are any (COLUMNS), its columns.

    counter: int32 (1,), 0.
    """
    SIZE: gl.constexpr = constants.SIZE
    q = gl.allocate_shared_memory(q_desc.dtype, [2, 1, SIZE // 2, 1, constants.HEAD_DIM], q_desc.layout)
    queries = Queries(q, q, barriers(1, 1), barriers(1, 2))
    keys = key_buffers(k_desc, v_desc, SIZE, constants.HEAD_DIM, constants.STAGES)
    queue = job_queue()
    sources = Sources(q_desc, q_desc, k_desc, v_desc, ck_desc, cv_desc)
    work = Work(items, n_rows, heads, tiles, n_cols, diagonal, columns, capacity, words_row)
    fence_async_shared()
    scale_log2 = scale * LOG2E
    gl.warp_specialize(
        [
            (_consumer, (queries, keys, queue, out_desc, out, lse_ptr, work, scale_log2, 0, constants)),
            (_consumer, (queries, keys, queue, out_desc, out, lse_ptr, work, scale_log2, 1, constants)),
            (producer, (sources, queries, keys, queue, counter, work, False, constants)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
