"""Key-major gradients on Hopper: dK and dV of slash tiles and of columns (hopper/queries.py has dQ).

One program owns 128 keys (or columns), 64 a warp group, and walks the queries that see them, 64 at a time. Their
log-sum-exp and delta come with them through the copy engine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mtraining.kernel.hopper.common import LOG2E, barriers, product_layout
from mtraining.kernel.hopper.copies import fetch_tile
from mtraining.kernel.hopper.items import fetch_halves
from mtraining.kernel.triton.common import KeyGradients, RowLists, tile_row, tile_slot
from mtraining.kernel.triton.hidden import KeyTables


class KeyConstants(NamedTuple):
    """Constants of a key-major kernel, whose argument ``constants`` it is.

    Attributes:
        TOEPLITZ: the kind of the tile lists (triton/lists.py).
        COLUMNS: keys are columns, else whole blocks.
        STARTS: queries have starts.
        GROUP: query heads that share the keys; a program walks GROUP // SPLITS of them, one after the other.
        SIZE: keys of a program.
        BLOCK_M: queries of a step.
        STAGES: steps in shared memory, being fetched or in use.
    """

    TOEPLITZ: bool
    COLUMNS: bool
    STARTS: bool
    GROUP: int
    SPLITS: int
    SIZE: int
    HEAD_DIM: int
    BLOCK_M: int
    STAGES: int


class KeySources(NamedTuple):
    """Descriptors of what the copy engine fetches."""

    q: Any
    do: Any
    k: Any
    v: Any
    lse: Any
    delta: Any


class Rooms(NamedTuple):
    """Shared memory of a program and its barriers (the table is in hopper/common.py).

    q and do [STAGES, 1, BLOCK_M, 1, HEAD_DIM], lse and delta [STAGES, 1, BLOCK_M],
    k and v [2, 1, SIZE // 2, 1, HEAD_DIM], one half a group.
    """

    q: Any
    do: Any
    lse: Any
    delta: Any
    k: Any
    v: Any
    kv_full: Any
    full: Any
    empty: Any


class OwnKeys(NamedTuple):
    """Whose keys a program owns: batch, kv head, first query head (``bh0``: with the batch), number of the tile.

    ``ends`` points to the end of the local queries that may attend to each of the keys; any pointer without starts.
    """

    batch: Any
    kv_head: Any
    head0: Any
    bh0: Any
    j: Any
    ends: Any


class SlashRows(NamedTuple):
    """The lists of query blocks that see each key block; ``limit`` is that of :func:`tile_row`."""

    tiles: RowLists
    n_rows: Any
    n_cols: Any
    limit: Any
    diagonal: Any


class ColumnRows(NamedTuple):
    """The query blocks that see a tile of columns, and what hides some columns from them.

    Attributes:
        begin, end: local blocks of queries.
        positions: pointer to the tile's columns.
        words, words_row: pointer to their hidden bits (triton/hidden.py), and the step to the next block's.
        q_blocks: pointer to the global numbers of the query blocks.
        masked_to: the first block of queries that lies after all of the tile's columns.
        present: columns of the tile that exist; more than a tile's where it is not the last.
    """

    begin: Any
    end: Any
    positions: Any
    words: Any
    words_row: Any
    q_blocks: Any
    masked_to: Any
    present: Any


class KeyVisit(NamedTuple):
    """The query blocks of one head that see the keys: their list and how many; origin and ``own`` as in ``TileRow``."""

    entries: Any
    count: Any
    origin: Any
    own: Any


@gluon.jit
def _fetch_queries(done, at, batch, head, bh, sources: KeySources, rooms: Rooms, STAGES: gl.constexpr):
    """Copy the queries from local row ``at`` when their stage is free."""
    stage = done % STAGES
    here = rooms.full.index(stage)
    mbarrier.wait(rooms.empty.index(stage), ((done // STAGES) & 1) ^ 1)
    mbarrier.expect(here, 2 * sources.q.block_type.nbytes + 2 * sources.lse.block_type.nbytes)
    fetch_tile(sources.q, [batch, at, head, 0], here, rooms.q.index(stage))
    fetch_tile(sources.do, [batch, at, head, 0], here, rooms.do.index(stage))
    fetch_tile(sources.lse, [bh, at], here, rooms.lse.index(stage))
    fetch_tile(sources.delta, [bh, at], here, rooms.delta.index(stage))


@gluon.jit
def _visit_of(bh, j, slashes: SlashRows, columns: ColumnRows, TOEPLITZ: gl.constexpr, COLUMNS: gl.constexpr):
    """The :class:`KeyVisit` of one head."""
    if COLUMNS:
        entries, count, origin, own = slashes.tiles.entries, columns.end - columns.begin, 0, 0
    else:
        row = tile_row(
            slashes.tiles,
            slashes.n_rows,
            slashes.n_cols,
            slashes.limit,
            slashes.diagonal,
            bh.to(gl.int64),
            j,
            TOEPLITZ,
            True,
        )
        entries, count, origin, own = row.entries + row.lo, row.hi - row.lo, row.origin, row.own
    return KeyVisit(entries, count, origin, own)


@gluon.jit
def _first_query(visit: KeyVisit, t, columns: ColumnRows, constants: gl.constexpr):
    """The first local query of a head's step ``t``."""
    SUB: gl.constexpr = constants.SIZE // constants.BLOCK_M
    if constants.COLUMNS:
        at = columns.begin * constants.SIZE + t * constants.BLOCK_M
    else:
        slot = tile_slot(gl.load(visit.entries + t // SUB), visit.origin, constants.TOEPLITZ, True)
        at = slot.to(gl.int32) * constants.SIZE + (t % SUB) * constants.BLOCK_M
    return at


@gluon.jit
def _producer(
    sources: KeySources,
    rooms: Rooms,
    own: OwnKeys,
    slashes: SlashRows,
    columns: ColumnRows,
    constants: gl.constexpr,
):
    """Fetch the keys and values once, then the queries that see them, step after step."""
    SIZE: gl.constexpr = constants.SIZE
    BLOCK_M: gl.constexpr = constants.BLOCK_M
    SUB: gl.constexpr = SIZE // BLOCK_M
    HEADS: gl.constexpr = constants.GROUP // constants.SPLITS
    here = rooms.kv_full.index(0)
    mbarrier.expect(here, 4 * sources.k.block_type.nbytes)
    fetch_halves(sources.k, own.batch, own.j * SIZE, own.kv_head, here, rooms.k, SIZE // 2)
    fetch_halves(sources.v, own.batch, own.j * SIZE, own.kv_head, here, rooms.v, SIZE // 2)
    done = 0
    for g in range(0, HEADS):
        visit = _visit_of(own.bh0 + g, own.j, slashes, columns, constants.TOEPLITZ, constants.COLUMNS)
        for t in range(0, visit.count * SUB):
            at = _first_query(visit, t, columns, constants)
            _fetch_queries(done, at, own.batch, own.head0 + g, own.bh0 + g, sources, rooms, constants.STAGES)
            done += 1


@gluon.jit
def _hidden_bits(columns: ColumnRows, i, key, W: gl.constexpr, SIZE: gl.constexpr):
    """The words [64] (triton/hidden.py) that hold the bits of 64 columns for local block of queries ``i``."""
    row = columns.words + i.to(gl.int64) * columns.words_row
    return gl.load(row + W * (SIZE // 64) + (key % (SIZE // 2)) // 32)


@gluon.jit
def _hide(s, t, diagonal_first, key, at, bits, columns: ColumnRows, constants: gl.constexpr):
    """Scores [64, BLOCK_M] of a head's step ``t`` with -inf where a query must not see a key.

    Args:
        diagonal_first: 1 if the first block of queries is on the causal diagonal. Slash tiles only.
        key, at: int32 [64], number within the tile, and position.
        bits: [64], :func:`_hidden_bits` of the step's block of queries. Columns only.
    """
    BLOCK_M: gl.constexpr = constants.BLOCK_M
    S_MMA: gl.constexpr = product_layout(BLOCK_M)
    SUB: gl.constexpr = constants.SIZE // BLOCK_M
    if constants.COLUMNS:
        s = gl.where((((bits >> (key % 32)) & 1) != 0)[:, None], float("-inf"), s)
        i = columns.begin + t // SUB
        if i < columns.masked_to:
            lane = (t % SUB) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_MMA))
            position = gl.load(columns.q_blocks + i) * constants.SIZE + lane
            s = gl.where(at[:, None] > position[None, :], float("-inf"), s)
    else:
        if t < diagonal_first * SUB:
            lane = (t % SUB) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, S_MMA))
            s = gl.where(key[:, None] > lane[None, :], float("-inf"), s)
    return s


@gluon.jit
def _hide_after_end(s, query, least, key, own: OwnKeys, columns: ColumnRows, constants: gl.constexpr):
    """Scores [64, BLOCK_M] from local ``query`` on, with -inf past the end of the queries that may attend to each key.

    Args:
        least: the end of the first of the keys, which is the earliest.
        key: int32 [64], number within the tile.
    """
    BLOCK_M: gl.constexpr = constants.BLOCK_M
    if query + BLOCK_M > least:
        queries = query + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, product_layout(BLOCK_M)))
        ends = gl.load(own.ends + key, mask=key < columns.present, other=0)
        s = gl.where(queries[None, :] >= ends[:, None], float("-inf"), s)
    return s


@gluon.jit
def _weights_and_gradient(s, stage, v, zero, scale_log2, rooms: Rooms, constants: gl.constexpr):
    """Weights and gradient of scores [64, BLOCK_M] of the queries in ``stage``, as left operands of dV and dK."""
    BLOCK_M: gl.constexpr = constants.BLOCK_M
    COLUMN: gl.constexpr = gl.SliceLayout(0, product_layout(BLOCK_M))
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, product_layout(constants.HEAD_DIM), 2)
    dtype: gl.constexpr = rooms.q.dtype
    do = rooms.do.index(stage).reshape([BLOCK_M, constants.HEAD_DIM])
    lse, delta = rooms.lse.index(stage), rooms.delta.index(stage)
    token = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
    lse2 = lse.reshape([BLOCK_M]).load(COLUMN)  # [BLOCK_M]
    weights = gl.exp2(s * scale_log2 - lse2[None, :])  # [64, BLOCK_M]
    delta = delta.reshape([BLOCK_M]).load(COLUMN)  # [BLOCK_M]
    dweights = warpgroup_mma_wait(0, deps=[token])
    gradient = weights * (dweights - delta[None, :])
    return gl.convert_layout(weights.to(dtype), OPERAND), gl.convert_layout(gradient.to(dtype), OPERAND)


@gluon.jit
def _consumer(
    rooms: Rooms, dkv: KeyGradients, own: OwnKeys, slashes: SlashRows, columns: ColumnRows, scale,
    W: gl.constexpr, constants: gl.constexpr,
):  # fmt: skip
    """dk and dv of 64 keys over every query that sees them, head after head."""
    SIZE: gl.constexpr = constants.SIZE
    HEAD_DIM: gl.constexpr = constants.HEAD_DIM
    BLOCK_M: gl.constexpr = constants.BLOCK_M
    HALF: gl.constexpr = SIZE // 2
    SUB: gl.constexpr = SIZE // BLOCK_M
    HEADS: gl.constexpr = constants.GROUP // constants.SPLITS
    S_MMA: gl.constexpr = product_layout(BLOCK_M)
    O_MMA: gl.constexpr = product_layout(HEAD_DIM)
    key = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, S_MMA))  # [64]
    at = key
    if constants.COLUMNS:
        at = gl.load(columns.positions + key, mask=key < columns.present, other=2147483647)
    if constants.STARTS:
        least = gl.load(own.ends + gl.minimum(W * HALF, columns.present - 1))
    scale_log2 = scale * LOG2E
    zero = gl.zeros([HALF, BLOCK_M], gl.float32, S_MMA)
    dk = gl.zeros([HALF, HEAD_DIM], gl.float32, O_MMA)
    dv = gl.zeros([HALF, HEAD_DIM], gl.float32, O_MMA)
    mbarrier.wait(rooms.kv_full.index(0), 0)
    k = rooms.k.index(W).reshape([HALF, HEAD_DIM])
    v = rooms.v.index(W).reshape([HALF, HEAD_DIM])
    done = 0
    for g in range(0, HEADS):
        visit = _visit_of(own.bh0 + g, own.j, slashes, columns, constants.TOEPLITZ, constants.COLUMNS)
        if visit.count > 0:
            # Prologue: scores of the first queries.
            stage = done % constants.STAGES
            mbarrier.wait(rooms.full.index(stage), (done // constants.STAGES) & 1)
            q = rooms.q.index(stage).reshape([BLOCK_M, HEAD_DIM])
            s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False)  # [64, BLOCK_M]
            if constants.COLUMNS:
                bits = _hidden_bits(columns, columns.begin, key, W, SIZE)
            else:
                bits = key
            s = _hide(s, 0, visit.own, key, at, bits, columns, constants)
            if constants.STARTS:
                query = _first_query(visit, 0, columns, constants)
                s = _hide_after_end(s, query, least, key, own, columns, constants)

            # Steady state: gradients of these queries beside scores of the next.
            for t in range(1, visit.count * SUB):
                stage = done % constants.STAGES
                do = rooms.do.index(stage).reshape([BLOCK_M, HEAD_DIM])
                p, ds = _weights_and_gradient(s, stage, v, zero, scale_log2, rooms, constants)
                done += 1
                after = done % constants.STAGES
                # Three products under way: k q^T of the next queries, p dout and ds q of these.
                mbarrier.wait(rooms.full.index(after), (done // constants.STAGES) & 1)
                q = rooms.q.index(after).reshape([BLOCK_M, HEAD_DIM])
                s_token = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
                dv_token = warpgroup_mma(p, do, dv, is_async=True)
                q = rooms.q.index(stage).reshape([BLOCK_M, HEAD_DIM])
                dk_token = warpgroup_mma(ds, q, dk, is_async=True)
                if constants.COLUMNS:
                    bits = _hidden_bits(columns, columns.begin + t // SUB, key, W, SIZE)
                if constants.STARTS:
                    query = _first_query(visit, t, columns, constants)
                s, dv, dk, p, ds = warpgroup_mma_wait(0, deps=[s_token, dv_token, dk_token, p, ds])
                mbarrier.arrive(rooms.empty.index(stage), count=1)
                s = _hide(s, t, visit.own, key, at, bits, columns, constants)
                if constants.STARTS:
                    s = _hide_after_end(s, query, least, key, own, columns, constants)

            # Drain: gradients of the last queries.
            stage = done % constants.STAGES
            do = rooms.do.index(stage).reshape([BLOCK_M, HEAD_DIM])
            p, ds = _weights_and_gradient(s, stage, v, zero, scale_log2, rooms, constants)
            dv_token = warpgroup_mma(p, do, dv, is_async=True)
            dk_token = warpgroup_mma(ds, rooms.q.index(stage).reshape([BLOCK_M, HEAD_DIM]), dk, is_async=True)
            dv, dk, p, ds = warpgroup_mma_wait(0, deps=[dv_token, dk_token, p, ds])
            mbarrier.arrive(rooms.empty.index(stage), count=1)
            done += 1

    # Epilogue: write; of the last tile of columns only those that exist.
    lane = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, O_MMA))  # [64]
    # [64, HEAD_DIM]
    offsets = lane[:, None] * dkv.row + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, O_MMA))[None, :]
    if constants.COLUMNS:
        gl.store(dkv.dk + offsets, dk * scale, mask=(lane < columns.present)[:, None])
        gl.store(dkv.dv + offsets, dv, mask=(lane < columns.present)[:, None])
    else:
        gl.store(dkv.dk + offsets, dk * scale)
        gl.store(dkv.dv + offsets, dv)


@gluon.jit
def _key_gradient(
    sources: KeySources, dkv: KeyGradients, own: OwnKeys, slashes: SlashRows, columns: ColumnRows, scale,
    constants: gl.constexpr,
):  # fmt: skip
    """Run the two groups and the producer of one program; ``dkv`` points at its first key."""
    HEAD_DIM: gl.constexpr = constants.HEAD_DIM
    HALF: gl.constexpr = constants.SIZE // 2
    STAGES: gl.constexpr = constants.STAGES
    BLOCK_M: gl.constexpr = constants.BLOCK_M
    dtype: gl.constexpr = sources.q.dtype
    k = gl.allocate_shared_memory(dtype, [2, 1, HALF, 1, HEAD_DIM], sources.k.layout)
    v = gl.allocate_shared_memory(dtype, [2, 1, HALF, 1, HEAD_DIM], sources.k.layout)
    q = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_M, 1, HEAD_DIM], sources.q.layout)
    do = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_M, 1, HEAD_DIM], sources.q.layout)
    lse = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], sources.lse.layout)
    delta = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], sources.lse.layout)
    rooms = Rooms(q, do, lse, delta, k, v, barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 2))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (rooms, dkv, own, slashes, columns, scale, 0, constants)),
            (_consumer, (rooms, dkv, own, slashes, columns, scale, 1, constants)),
            (_producer, (sources, rooms, own, slashes, columns, constants)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit(do_not_specialize=["batches", "kv_heads", "n_rows", "n_cols", "diagonal"])
def key_tiles_kernel(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dkv: KeyGradients, tiles: RowLists,
    scale, batches, kv_heads, n_rows, n_cols, diagonal, constants: gl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys from GROUP / SPLITS query heads of its group; rows are key blocks here.

    dk and dv are (SPLITS, batch, keys, kv_heads, head_dim): a caller with SPLITS > 1 sums over the first axis.
    """
    SIZE: gl.constexpr = constants.SIZE
    GROUP: gl.constexpr = constants.GROUP
    SPLITS: gl.constexpr = constants.SPLITS
    HEADS: gl.constexpr = GROUP // SPLITS
    pid = gl.program_id(0)
    split = pid % SPLITS
    # The first keys have the longest rows.
    j = (pid // SPLITS) % n_rows
    rest = pid // SPLITS // n_rows
    kv_head = rest % kv_heads
    batch = rest // kv_heads
    head0 = kv_head * GROUP + split * HEADS
    at = (
        (split * batches + batch).to(gl.int64) * dkv.batch
        + kv_head.to(gl.int64) * dkv.head
        + j.to(gl.int64) * SIZE * dkv.row
    )
    limit = n_cols
    # Not read without starts.
    ends = tiles.entries
    if constants.STARTS:
        ends = tiles.reach + (batch * n_rows + j) * SIZE
        limit = gl.cdiv(gl.load(ends + (SIZE - 1)), SIZE)
    _key_gradient(
        KeySources(q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc),
        KeyGradients(dkv.dk + at, dkv.dv + at, 0, dkv.row, 0),
        OwnKeys(batch, kv_head, head0, batch * kv_heads * GROUP + head0, j, ends),
        SlashRows(tiles, n_rows, n_cols, limit, diagonal),
        # There are no columns; any pointer will do.
        ColumnRows(0, 0, tiles.entries, tiles.entries, 0, tiles.row_blocks, 0, SIZE),
        scale,
        constants,
    )


@gluon.jit(do_not_specialize=["batches", "heads", "n_rows", "capacity", "num_blocks", "words_row", "splits"])
def key_columns_kernel(
    q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc, dkv: KeyGradients, tables: KeyTables,
    scale, batches, heads, n_rows, capacity, num_blocks, words_row, splits, constants: gl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of columns over one of ``splits`` equal shares of the queries that see it.

    dk and dv are (splits, batch, capacity, heads, head_dim): the caller sums over the first axis.
    """
    SIZE: gl.constexpr = constants.SIZE
    pid = gl.program_id(0)
    split = pid % splits
    head = (pid // splits) % heads
    batch = (pid // splits // heads) % batches
    # The longest tiles first, of all heads: they are few, and what runs last must be short.
    tile = pid // splits // heads // batches
    bh = batch * heads + head
    positions = tables.columns + bh.to(gl.int64) * capacity + tile * SIZE
    present = capacity - tile * SIZE
    # Columns are sorted, and the padding (num_blocks * SIZE) comes last.
    latest = gl.minimum(gl.load(positions + gl.minimum(present, SIZE) - 1), num_blocks * SIZE - 1)
    seen = tables.first_seen + bh.to(gl.int64) * words_row + tile * (SIZE // 32)
    lo = gl.load(seen)
    for w in gl.static_range(1, SIZE // 32):
        lo = gl.minimum(lo, gl.load(seen + w))
    masked_to = gl.load(tables.first_slot + latest // SIZE + 1)
    hi = n_rows
    # Not read without starts.
    ends = tables.columns
    if constants.STARTS:
        until = tables.last_seen + bh.to(gl.int64) * words_row + tile * (SIZE // 32)
        hi = gl.load(until)
        for w in gl.static_range(1, SIZE // 32):
            hi = gl.maximum(hi, gl.load(until + w))
        hi = gl.maximum(hi, lo)
        ends = tables.ends + bh.to(gl.int64) * capacity + tile * SIZE
    if constants.STARTS:
        # Shares stand still, so that what one document selects does not regroup the sums of another in the same tile.
        share = gl.cdiv(n_rows, splits)
        begin = gl.maximum(split * share, lo)
        end = gl.maximum(begin, gl.minimum((split + 1) * share, hi))
    else:
        share = gl.cdiv(hi - lo, splits)
        begin = lo + split * share
        end = gl.maximum(begin, gl.minimum(begin + share, hi))
    words = tables.words + bh.to(gl.int64) * n_rows * words_row + tile * (SIZE // 32)
    at = (
        (split * batches + batch).to(gl.int64) * dkv.batch
        + head.to(gl.int64) * dkv.head
        + tile.to(gl.int64) * SIZE * dkv.row
    )
    unused = tables.columns
    _key_gradient(
        KeySources(q_desc, do_desc, k_desc, v_desc, lse_desc, delta_desc),
        KeyGradients(dkv.dk + at, dkv.dv + at, 0, dkv.row, 0),
        OwnKeys(batch, head, head, bh, tile, ends),
        SlashRows(RowLists(unused, unused, unused, unused, None), n_rows, n_rows, n_rows, 0),
        ColumnRows(begin, end, positions, words, words_row, tables.q_blocks, masked_to, present),
        scale,
        constants,
    )
