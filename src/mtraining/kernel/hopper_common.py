"""What the Hopper kernels share: a program's shared memory and barriers, hidden entries, the steps of a softmax.

A program works on one block of 128 rows at a time, in three parts that run side by side: two warp groups that compute,
64 rows each, and a warp that has the copy engine (TMA) fetch what they visit, ahead of them. While one group is busy
with exponentials the other has the tensor cores, and within a group the next tile's scores are multiplied while this
one's are used. Portable Triton has neither: its tiles of 128 rows leave one program a multiprocessor, whose warps
all do the same thing at the same time (``docs/log.md``).

Query-major kernels start as many programs as there are multiprocessors, and each takes the next block of rows when it
is done with one (:func:`claim`): while a group writes its result, the next block's tiles are on their way. Who computes
a block changes nothing in it, so results repeat bit for bit.

A full barrier completes when a tile has arrived, an empty one when both groups have done with it; the ``t``-th tile
that a program fetches uses stage ``t % STAGES``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from mtraining.kernel.triton_common import tile_row, tile_slot

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
def desk():
    """Where the producer hands blocks of queries to both groups: (numbers, full, empty)."""
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return numbers, barriers(2, 1), barriers(2, 2)


@gluon.jit
def hand_over(item, turn, numbers, full, empty):
    """Tell both groups the ``turn``-th block of queries of this program."""
    place = turn % 2
    mbarrier.wait(empty.index(place), ((turn // 2) & 1) ^ 1)
    numbers.index(place).store(gl.full([1], item, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(full.index(place), count=1)


@gluon.jit
def taken(turn, numbers, full, empty):
    """The ``turn``-th block of queries of this program; past the last one when there is none left."""
    place = turn % 2
    mbarrier.wait(full.index(place), (turn // 2) & 1)
    item = gl.max(numbers.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(empty.index(place), count=1)
    return item


@gluon.jit
def claim(counter):
    """The next block of queries that no program has; the first ones go to the programs by their number."""
    return gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")


@gluon.jit
def block_of(item, n_rows, heads):
    """(batch, head, both in one, local block) of block of queries ``item``; a head's last rows, the longest, first."""
    i = n_rows - 1 - item % n_rows
    head = (item // n_rows) % heads
    batch = item // n_rows // heads
    return batch, head, (batch * heads + head).to(gl.int64), i


@gluon.jit
def tile_part(
    entries, bounds, row_blocks, col_blocks, bh, i, n_rows, n_cols, diagonal, TOEPLITZ: gl.constexpr
):
    """Slash tiles of a block of queries: how many, their list, its origin (``triton_common.tile_slot``), and 1 if the
    first is the one on the causal diagonal."""
    row, lo, hi, origin, own = tile_row(
        entries, bounds, row_blocks, col_blocks, bh, i, n_rows, n_cols, diagonal, TOEPLITZ, False
    )
    return hi - lo, row + lo, origin, own


@gluon.jit
def column_part(
    columns, words, q_blocks, before, upto, bh, i, n_rows, capacity, words_row,
    COLUMNS: gl.constexpr, SIZE: gl.constexpr,
):  # fmt: skip
    """Columns of a block of queries (``triton_hidden``): how many tiles, their positions, their hidden bits, the first
    tile that may reach into the block, and the block's first position."""
    if COLUMNS:
        steps = gl.cdiv(gl.load(upto + bh * n_rows + i), SIZE)
        row = columns + bh * capacity
        bits = words + (bh * n_rows + i) * words_row
        whole = gl.load(before + bh * n_rows + i) // SIZE
        position = gl.load(q_blocks + i) * SIZE
    else:
        steps, row, bits, whole, position = 0, columns, words, 0, 0
    return steps, row, bits, whole, position


@gluon.jit
def fetch_halves(desc, batch, first_row, head, full, smem, HALF: gl.constexpr):
    """Begin copying the rows of both groups; ``full`` already expects their bytes."""
    for w in gl.static_range(2):
        tma.async_copy_global_to_shared(desc, [batch, first_row + w * HALF, head, 0], full, smem.index(w))


@gluon.jit
def fetch_keys(
    t, start, batch, head, k_desc, v_desc, k, v, k_full, k_empty, v_full, v_empty, STAGES: gl.constexpr
):
    """Copy the keys and values from local row ``start`` when their stage is free."""
    stage = t % STAGES
    phase = ((t // STAGES) & 1) ^ 1
    mbarrier.wait(k_empty.index(stage), phase)
    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [batch, start, head, 0], k_full.index(stage), k.index(stage))
    mbarrier.wait(v_empty.index(stage), phase)
    mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [batch, start, head, 0], v_full.index(stage), v.index(stage))


@gluon.jit
def fetch_step(
    t, done, batch, head, tile_steps, row, origin, k_desc, v_desc, ck_desc, cv_desc,
    k, v, k_full, k_empty, v_full, v_empty,
    COLUMNS: gl.constexpr, TOEPLITZ: gl.constexpr, GROUP: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy what step ``t`` of a block of queries visits: its slash tiles first, then its columns."""
    if t < tile_steps:
        start = tile_slot(gl.load(row + t), origin, TOEPLITZ, False).to(gl.int32) * SIZE
        fetch_keys(
            done + t,
            start,
            batch,
            head // GROUP,
            k_desc,
            v_desc,
            k,
            v,
            k_full,
            k_empty,
            v_full,
            v_empty,
            STAGES,
        )
    else:
        if COLUMNS:
            start = (t - tile_steps) * SIZE
            fetch_keys(
                done + t, start, batch, head, ck_desc, cv_desc, k, v, k_full, k_empty, v_full, v_empty, STAGES
            )


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
    """Words with the bits (``triton_hidden``) of tile ``t`` of columns, of the last of ``steps`` beyond it: for each
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
