"""What the Hopper kernels share: a program's shared memory and barriers, hidden entries, the steps of a softmax.

A program works on one block of 128 rows at a time, in three parts that run side by side: two warp groups that compute,
64 rows each, and a warp that has the copy engine (TMA) fetch what they visit, ahead of them. While one group is busy
with exponentials the other has the tensor cores, and within a group the next tile's scores are multiplied while this
one's are used. Portable Triton has neither: its tiles of 128 rows leave one program a multiprocessor, whose warps
all do the same thing at the same time (``docs/experiments/kernels.md``).

A full barrier completes when a tile has arrived, an empty one when both groups have done with it; the ``t``-th tile
that a program fetches uses stage ``t % STAGES``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def product_layout(columns):
    """Registers of a (64, columns) product of one warp group."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each complete after ARRIVALS arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(COUNT):
        mbarrier.init(made.index(s), count=ARRIVALS)
    return made


@gluon.jit
def key_buffers(k_desc, v_desc, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Room and barriers for STAGES tiles of visited keys and values:
    (k, v, k_full, k_empty, v_full, v_empty)."""
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, SIZE, 1, HEAD_DIM], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, SIZE, 1, HEAD_DIM], v_desc.layout)
    return k, v, barriers(STAGES, 1), barriers(STAGES, 2), barriers(STAGES, 1), barriers(STAGES, 2)


@gluon.jit
def hide_after(s, own, W: gl.constexpr, SIZE: gl.constexpr):
    """Scores (64 queries, SIZE keys) of the first tile with -inf after each query, if it is the diagonal one (own)."""
    S_MMA: gl.constexpr = product_layout(SIZE)
    if own != 0:
        key = gl.arange(0, SIZE, layout=gl.SliceLayout(0, S_MMA))
        row = W * (SIZE // 2) + gl.arange(0, SIZE // 2, layout=gl.SliceLayout(1, S_MMA))
        s = gl.where(key[None, :] > row[:, None], float("-inf"), s)
    return s


@gluon.jit
def hidden_word(words, t, steps, SIZE: gl.constexpr):
    """Words with the bits (triton/hidden.py) of tile ``t`` of columns, of the last of ``steps`` beyond it: for each
    thread that of one column."""
    column = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    return gl.load(words + gl.minimum(t, gl.maximum(steps, 1) - 1) * (SIZE // 32) + column // 32)


@gluon.jit
def column_bias(word, SIZE: gl.constexpr):
    """What to add to the scores of a tile of columns: 0, or -inf where their bit of :func:`hidden_word` is set.

    One column a thread, then handed round: bits tested where the scores are would cost more than the softmax.
    """
    column = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    bias = gl.where(((word >> (column % 32)) & 1) != 0, float("-inf"), 0.0)
    return gl.convert_layout(bias, gl.SliceLayout(0, product_layout(SIZE)))


@gluon.jit
def hide_columns(s, bias, t, columns, whole, position, capacity, W: gl.constexpr, SIZE: gl.constexpr):
    """Scores (64 queries, SIZE columns) of tile ``t`` with -inf where a query must not see a column.

    Args:
        bias: :func:`column_bias`.
        columns: their positions, ``capacity`` of them; from tile ``whole`` on they may lie inside the block of queries,
            whose first token is at ``position``.
    """
    S_MMA: gl.constexpr = product_layout(SIZE)
    s = s + bias[None, :]
    if t >= whole:
        column = t * SIZE + gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
        at = gl.load(columns + column, mask=column < capacity, other=2147483647)
        at = gl.convert_layout(at, gl.SliceLayout(0, S_MMA))
        row = position + W * (SIZE // 2) + gl.arange(0, SIZE // 2, layout=gl.SliceLayout(1, S_MMA))
        s = gl.where(at[None, :] > row[:, None], float("-inf"), s)
    return s


@gluon.jit
def hide_first(
    s, tile_steps, own, word, columns, whole, position, capacity, W: gl.constexpr, COLUMNS: gl.constexpr,
    SIZE: gl.constexpr,
):  # fmt: skip
    """Scores of the first tile that a block of queries visits, of slashes if it has any, with -inf where hidden."""
    if COLUMNS:
        if tile_steps > 0:
            s = hide_after(s, own, W, SIZE)
        else:
            s = hide_columns(s, column_bias(word, SIZE), 0, columns, whole, position, capacity, W, SIZE)
    else:
        s = hide_after(s, own, W, SIZE)
    return s


@gluon.jit
def softmax_weights(s, top, total, scale_log2, GUARD: gl.constexpr):
    """exp2 of a tile's scores against the new maximum: (weights, factor for what came before, maximum, sum).

    GUARD: a row may have been hidden throughout, so that its maximum is still -inf.
    """
    new_top = gl.maximum(top, gl.max(s, 1) * scale_log2)
    safe = gl.where(new_top == float("-inf"), 0.0, new_top) if GUARD else new_top
    weights = gl.exp2(s * scale_log2 - safe[:, None])
    alpha = gl.exp2(top - safe)
    return weights, alpha, new_top, total * alpha + gl.sum(weights, 1)
