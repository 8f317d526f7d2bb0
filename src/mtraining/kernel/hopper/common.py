"""What the Hopper kernels share: a program's shared memory and barriers, hidden entries, the steps of a softmax.

A program works on one block of 128 rows at a time, in three parts that run side by side. Two warp groups compute,
64 rows each. One more warp, the producer, has the copy engine (TMA) fetch what they visit, ahead of them. While one
group is busy with exponentials the other has the tensor cores. Within a group, the next tile's scores are multiplied
while this tile's are used. Portable Triton has neither: its tiles of 128 rows leave one program a multiprocessor, whose
warps all do the same thing at the same time (``docs/experiments/kernels.md``).

Each part counts what it has handled: ``turn`` blocks handed out, ``number`` blocks computed, ``done`` tiles visited.
Tile number ``t`` uses stage ``t % STAGES`` of shared memory. A barrier completes again and again; its phase is the
parity of how often it has. A full barrier completes when data has arrived, an empty one when both groups have done with
the data. Waiting for the other parity of an empty barrier passes at once on the first round, when the room is free.

Query-major kernels (forward.py, queries.py):

=================  ======  ===============================  ==========================  ===========================
barrier            rooms   arrives                          waits                       phase
=================  ======  ===============================  ==========================  ===========================
queue.full         2       producer: a block's number       groups, for the next block  ``(turn // 2) & 1``
queue.empty        2       each group: number read          producer                    ``((turn // 2) & 1) ^ 1``
queries.full       1       copy engine: q (and dout)        groups, before a product    ``number & 1``
queries.empty      1       each group: q no longer needed   producer                    ``(number & 1) ^ 1``
keys.k_full        STAGES  copy engine: keys of a tile      groups, before q k^T        ``(done // STAGES) & 1``
keys.k_empty       STAGES  each group: keys used            producer                    ``((t // STAGES) & 1) ^ 1``
keys.v_full        STAGES  copy engine: values of a tile    groups, before p v          ``(done // STAGES) & 1``
keys.v_empty       STAGES  each group: values used          producer                    ``((t // STAGES) & 1) ^ 1``
=================  ======  ===============================  ==========================  ===========================

Key-major kernels (keys.py):

=================  ======  ===============================  ==========================  ===========================
barrier            rooms   arrives                          waits                       phase
=================  ======  ===============================  ==========================  ===========================
rooms.kv_full      1       copy engine: own keys, values    groups, once                ``0``
rooms.full         STAGES  copy engine: q, dout, lse,       groups, before k q^T        ``(done // STAGES) & 1``
                           delta of 64 queries
rooms.empty        STAGES  each group: queries used         producer                    ``((done // STAGES) & 1) ^ 1``
=================  ======  ===============================  ==========================  ===========================

``docs/figures/pipeline.svg`` draws one block of the forward kernel. Bundles of arguments are named tuples, as in
triton/common.py; ``constants`` is a bundle of constants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Keys(NamedTuple):
    """Room for STAGES tiles of visited keys and values [STAGES, 1, SIZE, 1, HEAD_DIM], and their barriers."""

    k: Any
    v: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


class ColumnVisit(NamedTuple):
    """The columns that a block of queries visits: how many tiles of them, and what hides some (triton/hidden.py).

    Attributes:
        steps: tiles of columns.
        positions: pointer to the head's columns, ``capacity`` of them.
        words: pointer to the block's hidden bits.
        whole: the first tile that may reach into the block.
        start: position of the block's first token.
        begin: number of the first column, a multiple of a tile. Tiles and all of the above count from here.
        masked: the end of the tiles that some query of the block must not see for its start; 0 without starts.
        firsts: pointer to the starts of the block's queries; any pointer without.
    """

    steps: Any
    positions: Any
    words: Any
    whole: Any
    start: Any
    capacity: Any
    begin: Any
    masked: Any
    firsts: Any


@gluon.jit
def key_buffers(k_desc, v_desc, SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """:class:`Keys`, all rooms empty."""
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, SIZE, 1, HEAD_DIM], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, SIZE, 1, HEAD_DIM], v_desc.layout)
    return Keys(k, v, barriers(STAGES, 1), barriers(STAGES, 2), barriers(STAGES, 1), barriers(STAGES, 2))


@gluon.jit
def hide_after(s, own, W: gl.constexpr, SIZE: gl.constexpr):
    """Scores [64, SIZE] of the first tile, with -inf after each query if it is the diagonal one (``own``)."""
    S_MMA: gl.constexpr = product_layout(SIZE)
    if own != 0:
        key = gl.arange(0, SIZE, layout=gl.SliceLayout(0, S_MMA))
        row = W * (SIZE // 2) + gl.arange(0, SIZE // 2, layout=gl.SliceLayout(1, S_MMA))
        s = gl.where(key[None, :] > row[:, None], float("-inf"), s)
    return s


@gluon.jit
def hide_before(s, key, reach, W: gl.constexpr, SIZE: gl.constexpr):
    """Scores [64, SIZE] of a slash tile from local key ``key`` on, with -inf before the first key of each query.

    ``reach`` points to the first local keys of the block's queries. Few tiles hold any key before the last of them.
    """
    S_MMA: gl.constexpr = product_layout(SIZE)
    HALF: gl.constexpr = SIZE // 2
    if key < gl.load(reach + (W * HALF + HALF - 1)):
        keys = key + gl.arange(0, SIZE, layout=gl.SliceLayout(0, S_MMA))
        first = gl.load(reach + W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, S_MMA)))
        s = gl.where(keys[None, :] < first[:, None], float("-inf"), s)
    return s


@gluon.jit
def hidden_word(columns: ColumnVisit, t, SIZE: gl.constexpr):
    """For each column of tile ``t`` the word [SIZE] with its hidden bit; past the last tile, those of the last."""
    column = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    tile = gl.minimum(t, gl.maximum(columns.steps, 1) - 1)
    return gl.load(columns.words + tile * (SIZE // 32) + column // 32)


@gluon.jit
def column_bias(word, SIZE: gl.constexpr):
    """What to add to the scores of a tile of columns [SIZE]: 0, or -inf where their bit of :func:`hidden_word` is set.

    One column a thread, then handed round: bits tested where the scores are would cost more than the softmax.
    """
    column = gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
    bias = gl.where(((word >> (column % 32)) & 1) != 0, float("-inf"), 0.0)
    return gl.convert_layout(bias, gl.SliceLayout(0, product_layout(SIZE)))


@gluon.jit
def hide_columns(s, bias, t, columns: ColumnVisit, W: gl.constexpr, constants: gl.constexpr):
    """Scores [64, SIZE] of tile ``t`` of columns, with -inf where a query must not see one.

    ``bias`` [SIZE], from :func:`column_bias`, hides columns from the whole block. Inside the block causality decides,
    and before it the starts of single queries.
    """
    SIZE: gl.constexpr = constants.SIZE
    S_MMA: gl.constexpr = product_layout(SIZE)
    s = s + bias[None, :]
    edge = t >= columns.whole
    if constants.STARTS:
        edge = edge | (t < columns.masked)
    if edge:
        column = t * SIZE + gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [4], [0]))
        at = gl.load(columns.positions + column, mask=column < columns.capacity, other=2147483647)
        at = gl.convert_layout(at, gl.SliceLayout(0, S_MMA))
        row = columns.start + W * (SIZE // 2) + gl.arange(0, SIZE // 2, layout=gl.SliceLayout(1, S_MMA))
        s = gl.where(at[None, :] > row[:, None], float("-inf"), s)
        if constants.STARTS:
            lane = gl.arange(0, SIZE // 2, layout=gl.SliceLayout(1, S_MMA))
            first = gl.load(columns.firsts + W * (SIZE // 2) + lane)
            s = gl.where(at[None, :] < first[:, None], float("-inf"), s)
    return s


@gluon.jit
def softmax_weights(s, top, total, scale_log2, GUARD: gl.constexpr):
    """exp2 of a tile's scores [64, SIZE] against the new maximum: (weights, factor for what came before, maximum, sum).

    GUARD: a row may have been hidden throughout, so that its maximum is still -inf.
    """
    new_top = gl.maximum(top, gl.max(s, 1) * scale_log2)
    safe = gl.where(new_top == float("-inf"), 0.0, new_top) if GUARD else new_top
    weights = gl.exp2(s * scale_log2 - safe[:, None])
    alpha = gl.exp2(top - safe)
    return weights, alpha, new_top, total * alpha + gl.sum(weights, 1)
