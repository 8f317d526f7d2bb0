"""Who works on which block of queries on Hopper, and the fetching of what it visits (hopper/common.py).

Query-major kernels start as many programs as there are multiprocessors. Each takes the next block of rows when it is
done with one (:func:`claim`). So the next block's tiles are on their way while a group writes its result. Who computes
a block changes nothing in it, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mtraining.kernel.hopper.common import (
    ColumnVisit,
    Keys,
    barriers,
    column_bias,
    hide_after,
    hide_before,
    hide_columns,
)
from mtraining.kernel.hopper.copies import fetch_tile
from mtraining.kernel.triton.common import RowLists, tile_row, tile_slot


class Constants(NamedTuple):
    """Constants of a query-major kernel, whose argument ``constants`` it is.

    Attributes:
        HAS_PREV: there is an earlier partial result to go on from.
        FINAL: the result is the last one, in the dtype of q.
        TOEPLITZ: the kind of the tile lists (triton/lists.py).
        COLUMNS: there are columns to visit too.
        STARTS: queries have starts: the bundles of lists hold what is None without.
        GROUP: query heads that share a kv head.
        SIZE: tokens of a block.
        STAGES: tiles in shared memory, being fetched or in use.
    """

    HAS_PREV: bool
    FINAL: bool
    TOEPLITZ: bool
    COLUMNS: bool
    STARTS: bool
    GROUP: int
    SIZE: int
    HEAD_DIM: int
    STAGES: int


class ColumnLists(NamedTuple):
    """Pointers of ``ColumnTables`` (triton/hidden.py) that query-major kernels read here; the last three are None
    without starts."""

    columns: Any
    words: Any
    before: Any
    upto: Any
    starts: Any
    begin: Any
    masked: Any


class Target(NamedTuple):
    """Where a query-major kernel writes, and the fp32 result that it adds to or merges with; strides are of both."""

    previous: Any
    result: Any
    batch: Any
    row: Any
    head: Any


class Work(NamedTuple):
    """All blocks of queries of a launch, ``items`` of them, and the lists of what they visit."""

    items: Any
    n_rows: Any
    heads: Any
    tiles: RowLists
    n_cols: Any
    diagonal: Any
    columns: ColumnLists
    capacity: Any
    words_row: Any


class Sources(NamedTuple):
    """Descriptors of what the copy engine fetches; without a gradient ``do`` is q once more."""

    q: Any
    do: Any
    k: Any
    v: Any
    ck: Any
    cv: Any


class Queries(NamedTuple):
    """Room for the block's queries and dout [2, 1, SIZE // 2, 1, HEAD_DIM], one half a group, and its barriers.

    Without a gradient ``do`` is q once more.
    """

    q: Any
    do: Any
    full: Any
    empty: Any


class Queue(NamedTuple):
    """Where the producer tells both groups which block of queries comes next: two numbers, and their barriers."""

    numbers: Any
    full: Any
    empty: Any


class Visit(NamedTuple):
    """What one block of queries visits: first its slash tiles (:func:`tile_row` of triton/common.py), then its columns.

    Attributes:
        bh: batch and head in one number.
        block: local number of the block.
        tile_steps: how many slash tiles.
        entries: pointer to their list.
        origin: for ``tile_slot`` of triton/common.py.
        own: 1 if the first tile is the one on the causal diagonal.
        reach: pointer to the first local keys of the block's queries (``TileLists.reach``); any pointer without starts.
    """

    batch: Any
    head: Any
    bh: Any
    block: Any
    tile_steps: Any
    entries: Any
    origin: Any
    own: Any
    reach: Any
    columns: ColumnVisit


@gluon.jit
def job_queue():
    """:class:`Queue`, empty."""
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Queue(numbers, barriers(2, 1), barriers(2, 2))


@gluon.jit
def hand_over(item, turn, queue: Queue):
    """Tell both groups the ``turn``-th block of queries of this program."""
    place = turn % 2
    mbarrier.wait(queue.empty.index(place), ((turn // 2) & 1) ^ 1)
    queue.numbers.index(place).store(gl.full([1], item, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(queue.full.index(place), count=1)


@gluon.jit
def taken(turn, queue: Queue):
    """The ``turn``-th block of queries of this program; past the last one when there is none left."""
    place = turn % 2
    mbarrier.wait(queue.full.index(place), (turn // 2) & 1)
    item = gl.max(queue.numbers.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(queue.empty.index(place), count=1)
    return item


@gluon.jit
def claim(counter):
    """The next block of queries that no program has; the first ones go to the programs by their number."""
    return gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")


@gluon.jit
def visit_of(item, work: Work, constants: gl.constexpr):
    """What block of queries ``item`` visits, a :class:`Visit`; a head's last blocks, the longest rows, come first."""
    TOEPLITZ: gl.constexpr = constants.TOEPLITZ
    COLUMNS: gl.constexpr = constants.COLUMNS
    STARTS: gl.constexpr = constants.STARTS
    SIZE: gl.constexpr = constants.SIZE
    n_rows = work.n_rows
    i = n_rows - 1 - item % n_rows
    head = (item // n_rows) % work.heads
    batch = item // n_rows // work.heads
    bh = (batch * work.heads + head).to(gl.int64)
    lists = work.columns
    if COLUMNS:
        steps = gl.cdiv(gl.load(lists.upto + bh * n_rows + i), SIZE)
        positions = lists.columns + bh * work.capacity
        words = lists.words + (bh * n_rows + i) * work.words_row
        whole = gl.load(lists.before + bh * n_rows + i) // SIZE
        start = gl.load(work.tiles.row_blocks + i) * SIZE
    else:
        steps, positions, words, whole, start = 0, lists.columns, lists.words, 0, 0
    # Without starts nothing is read through the last pointer, nor through ``reach``.
    columns = ColumnVisit(steps, positions, words, whole, start, work.capacity, 0, 0, lists.columns)
    limit = work.n_cols
    reach = lists.columns
    if STARTS:
        rows = (batch * n_rows + i) * SIZE
        reach = work.tiles.reach + rows
        limit = work.n_cols - gl.load(reach) // SIZE
        if COLUMNS:
            # A block that sees no column begins with the first, so that what is read ahead is there.
            skipped = gl.minimum(gl.load(lists.begin + bh * n_rows + i) // SIZE, steps)
            masked = gl.cdiv(gl.load(lists.masked + bh * n_rows + i), SIZE) - skipped
            columns = ColumnVisit(
                steps - skipped, positions + skipped * SIZE, words + skipped * (SIZE // 32), whole - skipped, start,
                work.capacity - skipped * SIZE, skipped * SIZE, masked, lists.starts + rows,
            )  # fmt: skip
    row = tile_row(work.tiles, n_rows, work.n_cols, limit, work.diagonal, bh, i, TOEPLITZ, False)
    return Visit(
        batch, head, bh, i, row.hi - row.lo, row.entries + row.lo, row.origin, row.own, reach, columns
    )


@gluon.jit
def slash_key(visit: Visit, t, constants: gl.constexpr):
    """The first local key of slash tile ``t``."""
    slot = tile_slot(gl.load(visit.entries + t), visit.origin, constants.TOEPLITZ, False)
    return slot.to(gl.int32) * constants.SIZE


@gluon.jit
def hide_first(s, word, visit: Visit, W: gl.constexpr, constants: gl.constexpr):
    """Scores [64, SIZE] of the first tile that a block visits, with -inf where hidden; slashes come before columns."""
    SIZE: gl.constexpr = constants.SIZE
    if constants.COLUMNS:
        if visit.tile_steps > 0:
            s = hide_after(s, visit.own, W, SIZE)
            if constants.STARTS:
                s = hide_before(s, slash_key(visit, 0, constants), visit.reach, W, SIZE)
        else:
            s = hide_columns(s, column_bias(word, SIZE), 0, visit.columns, W, constants)
    else:
        s = hide_after(s, visit.own, W, SIZE)
        if constants.STARTS:
            s = hide_before(s, slash_key(visit, 0, constants), visit.reach, W, SIZE)
    return s


@gluon.jit
def fetch_halves(desc, batch, first_row, head, full, smem, HALF: gl.constexpr):
    """Begin copying the rows of both groups; ``full`` already expects their bytes."""
    for w in gl.static_range(2):
        fetch_tile(desc, [batch, first_row + w * HALF, head, 0], full, smem.index(w))


@gluon.jit
def fetch_keys(t, start, batch, head, k_desc, v_desc, keys: Keys, STAGES: gl.constexpr):
    """Copy the keys and values from local row ``start`` when their stage is free."""
    stage = t % STAGES
    phase = ((t // STAGES) & 1) ^ 1
    mbarrier.wait(keys.k_empty.index(stage), phase)
    mbarrier.expect(keys.k_full.index(stage), k_desc.block_type.nbytes)
    fetch_tile(k_desc, [batch, start, head, 0], keys.k_full.index(stage), keys.k.index(stage))
    mbarrier.wait(keys.v_empty.index(stage), phase)
    mbarrier.expect(keys.v_full.index(stage), v_desc.block_type.nbytes)
    fetch_tile(v_desc, [batch, start, head, 0], keys.v_full.index(stage), keys.v.index(stage))


@gluon.jit
def fetch_step(t, done, visit: Visit, sources: Sources, keys: Keys, constants: gl.constexpr):
    """Copy what step ``t`` of a block of queries visits: its slash tiles first, then its columns."""
    if t < visit.tile_steps:
        start = slash_key(visit, t, constants)
        kv_head = visit.head // constants.GROUP
        fetch_keys(done + t, start, visit.batch, kv_head, sources.k, sources.v, keys, constants.STAGES)
    else:
        if constants.COLUMNS:
            start = visit.columns.begin + (t - visit.tile_steps) * constants.SIZE
            fetch_keys(
                done + t, start, visit.batch, visit.head, sources.ck, sources.cv, keys, constants.STAGES
            )


@gluon.jit
def producer(
    sources: Sources, queries: Queries, keys: Keys, queue: Queue, counter, work: Work,
    GRADIENT: gl.constexpr, constants: gl.constexpr,
):  # fmt: skip
    """Take block of queries after block of queries, and fetch it (GRADIENT: and dout's) with what it visits."""
    SIZE: gl.constexpr = constants.SIZE
    HAS_PREV: gl.constexpr = constants.HAS_PREV
    FINAL: gl.constexpr = constants.FINAL
    # A block that visits nothing keeps an earlier result where it stands; the groups pass over it too.
    IN_PLACE: gl.constexpr = HAS_PREV and not FINAL
    done = 0
    number = 0
    turn = 0
    item = gl.program_id(0)
    hand_over(item, turn, queue)
    while item < work.items:
        visit = visit_of(item, work, constants)
        steps = visit.columns.steps + visit.tile_steps
        following = item
        if steps > 0 or not IN_PLACE:
            full = queries.full.index(0)
            if GRADIENT:
                mbarrier.wait(queries.empty.index(0), (number & 1) ^ 1)
                mbarrier.expect(full, 4 * sources.q.block_type.nbytes)
                fetch_halves(
                    sources.q, visit.batch, visit.block * SIZE, visit.head, full, queries.q, SIZE // 2
                )
                fetch_halves(
                    sources.do, visit.batch, visit.block * SIZE, visit.head, full, queries.do, SIZE // 2
                )
            rounds = steps if GRADIENT else gl.maximum(steps, 1)
            for t in range(0, rounds):
                if t < steps:
                    fetch_step(t, done, visit, sources, keys, constants)
                if not GRADIENT:  # noqa: SIM102 -- the one is decided when compiling, the other when running
                    # The keys first: the room of the queries is free last.
                    if t == 0:
                        mbarrier.wait(queries.empty.index(0), (number & 1) ^ 1)
                        mbarrier.expect(full, 2 * sources.q.block_type.nbytes)
                        fetch_halves(
                            sources.q, visit.batch, visit.block * SIZE, visit.head, full, queries.q, SIZE // 2
                        )
                # Claim the next block while the groups have something to do.
                if t == 1:
                    following = claim(counter)
            done += steps
            number += 1
        if following == item:
            following = claim(counter)
        item = following
        turn += 1
        hand_over(item, turn, queue)
