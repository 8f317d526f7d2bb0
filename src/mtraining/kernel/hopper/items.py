"""Who works on which block of queries on Hopper, and the fetching of what it visits (hopper/common.py).

Query-major kernels start as many programs as there are multiprocessors, and each takes the next block of rows when it
is done with one (:func:`claim`): while a group writes its result, the next block's tiles are on their way. Who computes
a block changes nothing in it, so results repeat bit for bit.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from mtraining.kernel.hopper.common import barriers
from mtraining.kernel.triton.common import tile_row, tile_slot


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
def visits_of(
    item, n_rows, heads, entries, bounds, row_blocks, col_blocks, n_cols, diagonal, columns, words, before, upto,
    capacity, words_row, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr, SIZE: gl.constexpr,
):  # fmt: skip
    """What block of queries ``item`` visits; a head's last blocks, the longest rows, come first.

    Returns:
        batch, head, both in one, local block;
        of its slash tiles (triton/lists.py) how many, their list, its origin (``tile_slot`` of triton/common.py), and
        1 if the first is the one on the causal diagonal;
        of its columns (triton/hidden.py) how many tiles, their positions, their hidden bits, the first tile that may
        reach into the block, and the block's first position.
    """
    i = n_rows - 1 - item % n_rows
    head = (item // n_rows) % heads
    batch = item // n_rows // heads
    bh = (batch * heads + head).to(gl.int64)
    if COLUMNS:
        column_steps = gl.cdiv(gl.load(upto + bh * n_rows + i), SIZE)
        column_row = columns + bh * capacity
        bits = words + (bh * n_rows + i) * words_row
        whole = gl.load(before + bh * n_rows + i) // SIZE
        position = gl.load(row_blocks + i) * SIZE
    else:
        column_steps, column_row, bits, whole, position = 0, columns, words, 0, 0
    row, lo, hi, origin, own = tile_row(
        entries, bounds, row_blocks, col_blocks, bh, i, n_rows, n_cols, diagonal, TOEPLITZ, False
    )
    return batch, head, bh, i, hi - lo, row + lo, origin, own, column_steps, column_row, bits, whole, position


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
def producer(
    q_desc, do_desc, k_desc, v_desc, ck_desc, cv_desc, q, do, q_full, q_empty,
    k, v, k_full, k_empty, v_full, v_empty, numbers, number_full, number_empty, counter, items, n_rows, heads,
    entries, bounds, row_blocks, col_blocks, n_cols, diagonal, columns, words, before, upto, capacity, words_row,
    GRADIENT: gl.constexpr, IN_PLACE: gl.constexpr, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr,
    GROUP: gl.constexpr, SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Take block of queries after block of queries, and fetch it (GRADIENT: and dout's) with what it visits.

    IN_PLACE: a block that visits nothing keeps what it has, and the groups pass over it too.
    """
    done = 0
    number = 0
    turn = 0
    item = gl.program_id(0)
    hand_over(item, turn, numbers, number_full, number_empty)
    while item < items:
        batch, head, _, i, tile_steps, row, origin, _, column_steps, _, _, _, _ = visits_of(
            item, n_rows, heads, entries, bounds, row_blocks, col_blocks, n_cols, diagonal, columns, words, before,
            upto, capacity, words_row, TOEPLITZ, COLUMNS, SIZE,
        )  # fmt: skip
        steps = column_steps + tile_steps
        following = item
        if steps > 0 or not IN_PLACE:
            if GRADIENT:
                mbarrier.wait(q_empty.index(0), (number & 1) ^ 1)
                mbarrier.expect(q_full.index(0), 4 * q_desc.block_type.nbytes)
                fetch_halves(q_desc, batch, i * SIZE, head, q_full.index(0), q, SIZE // 2)
                fetch_halves(do_desc, batch, i * SIZE, head, q_full.index(0), do, SIZE // 2)
            rounds = steps if GRADIENT else gl.maximum(steps, 1)
            for t in range(0, rounds):
                if t < steps:
                    fetch_step(
                        t, done, batch, head, tile_steps, row, origin, k_desc, v_desc, ck_desc, cv_desc,
                        k, v, k_full, k_empty, v_full, v_empty, COLUMNS, TOEPLITZ, GROUP, SIZE, STAGES,
                    )  # fmt: skip
                if not GRADIENT:  # noqa: SIM102 -- the one is decided when compiling, the other when running
                    if t == 0:  # the keys first: the room of the queries is free last
                        mbarrier.wait(q_empty.index(0), (number & 1) ^ 1)
                        mbarrier.expect(q_full.index(0), 2 * q_desc.block_type.nbytes)
                        fetch_halves(q_desc, batch, i * SIZE, head, q_full.index(0), q, SIZE // 2)
                if t == 1:  # while the groups have something to do
                    following = claim(counter)
            done += steps
            number += 1
        if following == item:
            following = claim(counter)
        item = following
        turn += 1
        hand_over(item, turn, numbers, number_full, number_empty)
