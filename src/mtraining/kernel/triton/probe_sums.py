"""Sums of the probe's mass by slash: along the diagonals of a tile of scores, or by block diagonal.

All are added to int64 fixed-point totals. Integer additions commute, so the result repeats bit for bit whatever the
order of programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Shape(NamedTuple):
    """Constants of the probe's kernels, whose argument ``shape`` it is.

    Attributes:
        SIZE: tokens that a block diagonal spans; 1: slashes are token distances.
        KV_HEADS: kv heads, each read by GROUP query heads.
        BLOCK_D: HEAD_DIM, padded to a power of two.
        BLOCK_M, BLOCK_N: probe queries and keys of a tile of scores.
        PRECISION: of products, as ``tl.dot`` names it.
    """

    SIZE: int
    KV_HEADS: int
    GROUP: int
    HEAD_DIM: int
    BLOCK_D: int
    BLOCK_M: int
    BLOCK_N: int
    PRECISION: str


class KeyTile(NamedTuple):
    """One tile of local keys.

    Attributes:
        k: the keys [BLOCK_N, BLOCK_D].
        positions: pointer to the first one's position; ``at`` [BLOCK_N] has them all.
        left: keys from the first one to the last local one, of ``keys``.
        astray: how many do not stand where consecutive keys would.
        blind, end: tiles of probe queries before the first one, and up to the last one, that may see a key.
    """

    k: Any
    positions: Any
    at: Any
    left: Any
    keys: Any
    astray: Any
    blind: Any
    end: Any
    batch: Any
    kv_head: Any


class Sums(NamedTuple):
    """Where mass is added up: pointers to ``columns``, of the tile's first key, and ``totals`` of slashes.

    Totals are int64 (batch * q_heads, slashes), in units of 1 / ``unit``.
    """

    columns: Any
    totals: Any
    unit: Any
    slashes: Any


@triton.jit
def add_distances(total_ptr, prob, shift, distance, unit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add the sums along the diagonals of ``prob`` (queries and keys both consecutive) to the totals by distance.

    ``distance`` is that of the first query and the first key; row i, column j stand at distance + i - j. Rotating row i
    by ``shift`` = i lines every diagonal up in one column of the tile, which then holds two of them, BLOCK_N apart.
    """
    tl.static_assert(BLOCK_M <= BLOCK_N, "a column would hold three diagonals")
    lane = tl.arange(0, BLOCK_N)
    column = shift[:, None] + (BLOCK_N - 1) - lane[None, :]
    near = column < BLOCK_N
    rotated = tl.gather(prob, column & (BLOCK_N - 1), 1)
    at = total_ptr + (distance - (BLOCK_N - 1)) + lane
    total = tl.sum(tl.where(near, rotated, 0.0), 0)
    tl.atomic_add(at, (total * unit).to(tl.int64), mask=total > 0.0, sem="relaxed")
    total = tl.sum(tl.where(near, 0.0, rotated), 0)
    tl.atomic_add(at + BLOCK_N, (total * unit).to(tl.int64), mask=total > 0.0, sem="relaxed")


@triton.jit
def add_entries(
    total_ptr, prob, probe_pos_ptr, base_ptr, key_at, rows, unit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Add each entry of ``prob`` to the totals by distance: for queries or keys at scattered positions."""
    lane = tl.arange(0, 16)
    # A slice of rows at a time: a whole tile of addresses would not fit.
    for first in range(0, BLOCK_M, 16):
        index = tl.broadcast_to((first + lane)[:, None], [16, BLOCK_N])
        part = tl.gather(prob, index, 0)
        probe_at = tl.load(probe_pos_ptr + first + lane, mask=first + lane < rows, other=0).to(tl.int32)
        if base_ptr is not None:
            probe_at += tl.load(base_ptr + first + lane, mask=first + lane < rows, other=0).to(tl.int32)
        at = total_ptr + (probe_at[:, None] - key_at[None, :])
        tl.atomic_add(at, (part * unit).to(tl.int64), mask=part > 0.0, sem="relaxed")


@triton.jit
def less_column(x, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """x[i] - j / SIZE for row i and column j, fp32 (BLOCK_M, BLOCK_N).

    Column j = 8 n + 2 m + c: tensor cores leave a thread the columns of one m, so that 8 n + c are constants in its
    instructions. As one row of numbers the columns would take a register each, all through the loop.
    """
    middle = tl.arange(0, 4).to(tl.float32) * (2 / SIZE)
    outer = (tl.arange(0, BLOCK_N // 8)[:, None] * 8 + tl.arange(0, 2)[None, :]).to(tl.float32) / SIZE
    rest = (x[:, None] - middle[None, :])[:, None, :, None] - outer[None, :, None, :]
    return tl.reshape(rest, [BLOCK_M, BLOCK_N])


@triton.jit
def add_diagonals(
    total_ptr,
    prob,
    farthest,
    base,
    reach,
    unit,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add ``prob`` (keys consecutive, queries anywhere) to the totals by block diagonal: three sums a query.

    Diagonal 0 of a query is total ``base``, and it has ``reach`` of them; both [BLOCK_M], or one number for all.

    ``farthest`` is each query's distance from where the first key stands: SIZE a + r. The tile is no wider than a
    block, so key j is less than one block diagonal from a, at a + (r - j) / SIZE: this offset's share goes to a + 1 or
    a - 1, the rest to a.
    """
    tl.static_assert(BLOCK_N <= SIZE, "a query would reach further diagonals")
    farthest = tl.maximum(farthest, 0)  # queries before all keys have nothing to add
    diagonal = farthest // SIZE
    offset = less_column((farthest - diagonal * SIZE).to(tl.float32) / SIZE, SIZE, BLOCK_M, BLOCK_N)
    above = tl.sum(prob * tl.maximum(offset, 0.0), 1)
    below = tl.sum(prob * tl.maximum(-offset, 0.0), 1)
    own = tl.sum(prob, 1) - above - below
    # As one tensor (BLOCK_M, 2, 2): one trip through shared memory to the threads that add.
    sums = tl.join(tl.join(below, own), tl.join(above, tl.zeros_like(own)))
    step = tl.arange(0, 2)[None, :, None] + 2 * tl.arange(0, 2)[None, None, :] - 1
    at = diagonal[:, None, None] + step
    inside = (sums > 0.0) & (at >= 0) & (at < reach)  # rounding may put a key at distance 0 a hair below
    tl.atomic_add(total_ptr + (base + at), (sums * unit).to(tl.int64), mask=inside, sem="relaxed")


@triton.jit
def add_runs(total_ptr, prob, probe_at, base, reach, tile: KeyTile, sums: Sums, shape: tl.constexpr):
    """:func:`add_diagonals` for keys anywhere: each run of consecutive positions by itself."""
    lane = tl.arange(0, shape.BLOCK_N)
    later = (lane > 0) & (lane < tile.left)
    previous = tl.load(tile.positions + lane - 1, mask=later, other=0).to(tl.int32)
    run_of = tl.cumsum((later & (tile.at != previous + 1)).to(tl.int32), 0)
    for run in range(tl.max(run_of, 0) + 1):
        inside = run_of == run
        # Where the tile's first key would stand if all of it were this run.
        origin = tl.min(tl.where(inside, tile.at - lane, 2**31 - 1), 0)
        part = tl.where(inside[None, :], prob, 0.0)
        add_diagonals(
            total_ptr, part, probe_at - origin, base, reach, sums.unit, shape.SIZE, shape.BLOCK_M, shape.BLOCK_N
        )  # fmt: skip
