"""Scores of a few probe queries against all local keys, in two passes that store no probabilities.

One program takes one tile of keys of one kv head and every query head that reads it. Keys therefore come from memory
once a pass; the probe's queries, a few KiB a head, come from the cache. Probe queries that stand before all keys of a
tile are left out. This is half of all pairs where the probe is spread over the sequence. Under a scope (packed
documents, windows) queries whose first key stands behind the tile are left out too. So a document's queries meet its
own keys only.

Sums over distances are taken along the diagonals of the score tile, sums over block diagonals as three numbers a query
and tile (probe_sums.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtraining.kernel.backend import ProbeScope
from mtraining.kernel.triton.common import (
    LN2,
    LOG2E,
    Strided,
    load_tile_rows,
    start_of_row,
    strided,
    tile_offsets,
)
from mtraining.kernel.triton.launch import launch
from mtraining.kernel.triton.probe_sums import (
    KeyTile,
    Shape,
    Sums,
    add_diagonals,
    add_distances,
    add_entries,
    add_runs,
    less_column,
)
from mtraining.kernel.triton.tile_sizes import check_block_size, interpreted, padded


class Scope(NamedTuple):
    """Pointers to a ``ProbeScope``'s int64 (batch, count) tensors, in kernels to those of one batch row; or None."""

    first_keys: Any
    bases: Any
    reach: Any


class ProbeQueries(NamedTuple):
    """The probe: queries (batch, count, q_heads, head_dim), and pointers to positions int64 (count,), scope and lse.

    lse is fp32 (batch, q_heads, count), global; the first pass has none yet and does not read it.
    """

    x: Strided
    positions: Any
    scope: Scope
    lse: Any
    count: Any


@triton.jit
def _first_reached(probe_pos_ptr, probes, nearest, BLOCK: tl.constexpr):
    """Number of the first probe query at or after key position ``nearest``; ``probes`` where all stand before it.

    Queries before it see none of a tile of keys whose first position that is; where they ascend, all others see some.
    """
    lane = tl.arange(0, BLOCK)
    found = tl.full([BLOCK], 0, tl.int32) + probes
    for start in range(0, probes, BLOCK):
        row = start + lane
        probe_at = tl.load(probe_pos_ptr + row, mask=row < probes, other=-1).to(tl.int32)
        found = tl.minimum(found, tl.where(probe_at >= nearest, row, probes))
    return tl.min(found, 0)


@triton.jit
def _last_reached(first_key_ptr, probes, farthest, BLOCK: tl.constexpr):
    """Number after the last probe query whose first key stands at or before key position ``farthest``."""
    lane = tl.arange(0, BLOCK)
    found = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, probes, BLOCK):
        row = start + lane
        first_key = tl.load(first_key_ptr + row, mask=row < probes, other=2**31 - 1).to(tl.int32)
        found = tl.maximum(found, tl.where(first_key <= farthest, row + 1, 0))
    return tl.max(found, 0)


@triton.jit
def _of_batch(scope: Scope, batch, probes):
    """The scope of one batch row."""
    first_keys = scope.first_keys + batch * probes
    return Scope(first_keys, scope.bases + batch * probes, scope.reach + batch * probes)


@triton.jit
def _tiles_reached(
    probe_pos_ptr, scope: Scope, probes, key_at, left, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(blind, end) of a :class:`KeyTile` with keys at ``key_at`` [BLOCK_N]."""
    blind = _first_reached(probe_pos_ptr, probes, tl.min(key_at, 0), BLOCK_N) // BLOCK_M
    end = tl.cdiv(probes, BLOCK_M)
    if scope.first_keys is not None:
        farthest = tl.max(tl.where(tl.arange(0, BLOCK_N) < left, key_at, -1), 0)
        end = tl.cdiv(_last_reached(scope.first_keys, probes, farthest, BLOCK_N), BLOCK_M)
        end = tl.maximum(end, blind)
    return blind, end


@triton.jit
def _key_positions(key_pos_ptr, left, BLOCK_N: tl.constexpr):
    """Positions of a tile of keys; those that are not there stand after every query."""
    column = tl.arange(0, BLOCK_N)
    return tl.load(key_pos_ptr + column, mask=column < left, other=2**31 - 1).to(tl.int32)


@triton.jit
def _raw_scores(probe: ProbeQueries, k, batch, head, probe_tile, shape: tl.constexpr):
    """Products [BLOCK_M, BLOCK_N] of a tile of probe queries with keys ``k``, and the queries' positions [BLOCK_M]."""
    first, row = (probe_tile * shape.BLOCK_M).to(tl.int64), tl.arange(0, shape.BLOCK_M)
    left = probe.count - probe_tile * shape.BLOCK_M
    probe_at = tl.load(probe.positions + first + row, mask=row < left, other=-1).to(tl.int32)
    base = start_of_row(probe.x, batch, head, first)
    offsets = tile_offsets(probe.x.row, shape.BLOCK_M, shape.BLOCK_D)
    q = load_tile_rows(base, offsets, left, shape.HEAD_DIM, shape.BLOCK_D)  # [BLOCK_M, BLOCK_D]
    return tl.dot(q, tl.trans(k), input_precision=shape.PRECISION), probe_at


@triton.jit
def probe_lse_kernel(
    probe: Strided, k: Strided, probe_pos_ptr, key_pos_ptr, scope: Scope, part_ptr, scale_log2, probes, keys, tiles,
    shape: tl.constexpr,
):  # fmt: skip
    """Log2-sum-exp2 of every probe query over one tile of keys: part (batch, q_heads, tiles, probes)."""
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    BLOCK_N: tl.constexpr = shape.BLOCK_N
    BLOCK_D: tl.constexpr = shape.BLOCK_D
    KV_HEADS: tl.constexpr = shape.KV_HEADS
    GROUP: tl.constexpr = shape.GROUP
    tile, bh = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (bh // KV_HEADS).to(tl.int64), (bh % KV_HEADS).to(tl.int64)
    first = tile.to(tl.int64) * BLOCK_N
    left = keys - tile * BLOCK_N
    key_at = _key_positions(key_pos_ptr + first, left, BLOCK_N)  # [BLOCK_N]
    lane = tl.arange(0, BLOCK_M)
    if scope.first_keys is not None:
        probe_pos_ptr += batch * probes
        scope = _of_batch(scope, batch, probes)
    blind, end = _tiles_reached(probe_pos_ptr, scope, probes, key_at, left, BLOCK_M, BLOCK_N)
    for member in range(GROUP):
        place = (((batch * KV_HEADS + kv_head) * GROUP + member) * tiles + tile) * probes
        # Tiles of queries that all stand before all keys.
        for probe_tile in range(blind):
            row = probe_tile * BLOCK_M + lane
            tl.store(part_ptr + place + row, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=row < probes)
        if scope.first_keys is not None:
            # And those whose keys all stand behind these.
            for probe_tile in range(end, tl.cdiv(probes, BLOCK_M)):
                row = probe_tile * BLOCK_M + lane
                nothing = tl.full([BLOCK_M], float("-inf"), tl.float32)
                tl.store(part_ptr + place + row, nothing, mask=row < probes)
    k_base = start_of_row(k, batch, kv_head, first)
    k_tile = load_tile_rows(k_base, tile_offsets(k.row, BLOCK_N, BLOCK_D), left, shape.HEAD_DIM, BLOCK_D)
    seeing = tl.maximum(end - blind, 1)  # a divisor
    for step in range(GROUP * (end - blind)):
        head = kv_head * GROUP + step // seeing
        probe_tile = blind + step % seeing
        # There is no lse yet; any pointer will do.
        queries = ProbeQueries(probe, probe_pos_ptr, scope, part_ptr, probes)
        scores, probe_at = _raw_scores(queries, k_tile, batch, head, probe_tile, shape)
        seen = key_at[None, :] <= probe_at[:, None]
        if scope.first_keys is not None:
            row = probe_tile * BLOCK_M + lane
            first_key = tl.load(scope.first_keys + row, mask=row < probes, other=0).to(tl.int32)
            seen = seen & (key_at[None, :] >= first_key[:, None])
        scores = tl.where(seen, scores * scale_log2, float("-inf"))
        top = tl.max(scores, 1)
        empty = top == float("-inf")
        total = tl.sum(tl.exp2(scores - tl.where(empty, 0.0, top)[:, None]), 1)
        part = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
        row = probe_tile * BLOCK_M + lane
        place = ((batch * KV_HEADS * GROUP + head) * tiles + tile) * probes
        tl.store(part_ptr + place + row, part, mask=row < probes)


@triton.jit
def join_lse_kernel(part_ptr, lse_ptr, probes, tiles, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr):
    """The tiles' log2-sum-exp2, joined in a fixed order -> natural log: lse (batch * q_heads, probes)."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        places = (row * tiles + tile[:, None]) * probes + column[None, :]
        there = (tile < tiles)[:, None] & (column < probes)[None, :]
        part = tl.load(part_ptr + places, mask=there, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(part, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(part - safe[None, :]), 0)
        top = new_top
    empty = top == float("-inf")
    lse = (top + tl.log2(tl.where(empty, 1.0, total))) * LN2
    tl.store(lse_ptr + row * probes + column, tl.where(empty, float("-inf"), lse), mask=column < probes)


@triton.jit
def _mass_of_tile(
    probe: ProbeQueries, tile: KeyTile, sums: Sums, scale_log2, CONSECUTIVE: tl.constexpr, shape: tl.constexpr
):
    """The mass of one tile of keys; CONSECUTIVE: all are there and follow one another."""
    SIZE: tl.constexpr = shape.SIZE
    GROUP: tl.constexpr = shape.GROUP
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    BLOCK_N: tl.constexpr = shape.BLOCK_N
    probes, blind, end, scope = probe.count, tile.blind, tile.end, probe.scope
    seeing = tl.maximum(end - blind, 1)  # a divisor
    key_start = tl.load(tile.positions).to(tl.int32)
    lane, column = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    # Rows a thread of the tensor cores holds, 8 apart, are added as they come; the others once a head.
    columns = tl.zeros([BLOCK_M // 16, 8, BLOCK_N], tl.float32)
    for step in range(GROUP * (end - blind)):
        head, probe_tile = tile.kv_head * GROUP + step // seeing, blind + step % seeing
        head_row = tile.batch * shape.KV_HEADS * GROUP + head
        scores, probe_at = _raw_scores(probe, tile.k, tile.batch, head, probe_tile, shape)
        row = probe_tile * BLOCK_M + lane
        lse2 = tl.load(probe.lse + head_row * probes + row, mask=row < probes, other=0.0)  # [BLOCK_M]
        lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2 * LOG2E)
        if CONSECUTIVE:
            farthest = tl.minimum(probe_at - key_start, BLOCK_N)
            seen = less_column(farthest.to(tl.float32), 1, BLOCK_M, BLOCK_N) >= 0.0
        else:
            seen = tile.at[None, :] <= probe_at[:, None]
        if scope.first_keys is not None:
            first_key = tl.load(scope.first_keys + row, mask=row < probes, other=0).to(tl.int32)
            if CONSECUTIVE:
                nearest = tl.minimum(tl.maximum(first_key - key_start, 0), BLOCK_N)
                seen = seen & (less_column(nearest.to(tl.float32), 1, BLOCK_M, BLOCK_N) <= 0.0)
            else:
                seen = seen & (tile.at[None, :] >= first_key[:, None])
        # [BLOCK_M, BLOCK_N]
        prob = tl.exp2(tl.where(seen, scores * scale_log2 - lse2[:, None], float("-inf")))

        # Mass by key.
        pairs = tl.sum(tl.reshape(prob, [BLOCK_M // 16, 2, 8, BLOCK_N]), 1)
        columns = tl.where(probe_tile == blind, 0.0, columns) + pairs
        if probe_tile == end - 1:
            total = tl.sum(tl.reshape(columns, [BLOCK_M // 2, BLOCK_N]), 0)
            tl.store(sums.columns + head_row * tile.keys + column, total, mask=column < tile.left)

        # Mass by slash.
        totals = sums.totals + head_row * sums.slashes
        if SIZE > 1:
            base, reach = 0, sums.slashes
            if scope.first_keys is not None:
                base = tl.load(scope.bases + row, mask=row < probes, other=0).to(tl.int32)[:, None, None]
                reach = tl.load(scope.reach + row, mask=row < probes, other=0).to(tl.int32)[:, None, None]
        if CONSECUTIVE:
            add_diagonals(totals, prob, probe_at - key_start, base, reach, sums.unit, SIZE, BLOCK_M, BLOCK_N)
        elif SIZE > 1:
            add_runs(totals, prob, probe_at, base, reach, tile, sums, shape)
        else:
            starts = probe.positions + probe_tile * BLOCK_M
            probe_start = tl.load(starts).to(tl.int32)
            astray = (probe_at != probe_start + lane) & (row < probes)
            base_ptr = scope.bases
            if scope.first_keys is not None:
                base_ptr += probe_tile * BLOCK_M
                base = tl.load(scope.bases + row, mask=row < probes, other=0).to(tl.int32)
                own_base = tl.load(base_ptr).to(tl.int32)
                # Queries of one document.
                astray = astray | ((base != own_base) & (row < probes))
            probes_astray = tl.sum(astray.to(tl.int32), 0)
            if tile.astray + probes_astray == 0:
                # The row numbers, but loaded: indices known before the loop would be kept in registers throughout it.
                shift = probe_at - probe_start
                distance = probe_start - key_start
                if scope.first_keys is not None:
                    distance += own_base
                add_distances(totals, prob, shift, distance, sums.unit, BLOCK_M, BLOCK_N)
            else:
                rows = probes - probe_tile * BLOCK_M
                add_entries(totals, prob, starts, base_ptr, tile.at, rows, sums.unit, BLOCK_M, BLOCK_N)


@triton.jit
def probe_mass_kernel(
    probe: Strided, k: Strided, probe_pos_ptr, key_pos_ptr, scope: Scope, lse_ptr, column_ptr, total_ptr,
    scale_log2, unit, probes, keys, slashes, shape: tl.constexpr,
):  # fmt: skip
    """Probability by key: column (batch * q_heads, keys) fp32; by slash: total (batch * q_heads, slashes) int64."""
    SIZE: tl.constexpr = shape.SIZE
    BLOCK_M: tl.constexpr = shape.BLOCK_M
    BLOCK_N: tl.constexpr = shape.BLOCK_N
    BLOCK_D: tl.constexpr = shape.BLOCK_D
    tile, bh = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (bh // shape.KV_HEADS).to(tl.int64), (bh % shape.KV_HEADS).to(tl.int64)
    first = tile.to(tl.int64) * BLOCK_N
    left = keys - tile * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    key_pos_ptr += first
    column_ptr += first
    key_at = _key_positions(key_pos_ptr, left, BLOCK_N)  # [BLOCK_N]
    astray = key_at != tl.load(key_pos_ptr).to(tl.int32) + lane
    if SIZE == 1:
        astray &= lane < left
    keys_astray = tl.sum(astray.to(tl.int32), 0)
    if scope.first_keys is not None:
        probe_pos_ptr += batch * probes
        scope = _of_batch(scope, batch, probes)
    blind, end = _tiles_reached(probe_pos_ptr, scope, probes, key_at, left, BLOCK_M, BLOCK_N)
    if blind >= end:
        for head in range(shape.GROUP):
            row = bh.to(tl.int64) * shape.GROUP + head
            tl.store(column_ptr + row * keys + lane, tl.zeros([BLOCK_N], tl.float32), mask=lane < left)
    k_base = start_of_row(k, batch, kv_head, first)
    # [BLOCK_N, BLOCK_D]
    k_tile = load_tile_rows(k_base, tile_offsets(k.row, BLOCK_N, BLOCK_D), left, shape.HEAD_DIM, BLOCK_D)
    queries = ProbeQueries(probe, probe_pos_ptr, scope, lse_ptr, probes)
    own = KeyTile(k_tile, key_pos_ptr, key_at, left, keys, keys_astray, blind, end, batch, kv_head)
    sums = Sums(column_ptr, total_ptr, unit, slashes)
    if SIZE > 1:  # noqa: SIM102  known when compiled, and the next is not
        if keys_astray == 0:
            _mass_of_tile(queries, own, sums, scale_log2, True, shape)
            return
    _mass_of_tile(queries, own, sums, scale_log2, False, shape)


class ProbeTiles(NamedTuple):
    """Tile of queries x tile of keys, and launch options."""

    queries: int
    keys: int
    options: dict[str, int]


def probe_tiles(
    probes: int, head_dim: int, itemsize: int, capability: tuple[int, int], block_size: int = 1
) -> ProbeTiles:
    """Score tile of a program; its operands stay within 128 KiB of shared memory.

    ``block_size`` > 1 is for masses by block diagonal: tiles of keys that divide blocks, so that in every layout the
    keys of a tile follow one another. Their loop does with 168 registers; only the one for other orders spills.
    """
    options = {"num_warps": 4, "num_stages": 2}
    fits = block_size & -block_size if block_size > 1 else 128
    if itemsize == 4 and not interpreted():  # exact fp32 products, no tensor cores
        return ProbeTiles(32, min(32, fits), options)
    queries = max(16, min(64, triton.next_power_of_2(probes)))
    widest = 128 if head_dim <= 128 else 64
    if block_size > 1 and capability[0] == 10:
        widest = 64  # there a thread holds whole rows of scores
    elif block_size > 1:
        options["maxnreg"] = 168  # three programs a multiprocessor
    return ProbeTiles(queries, min(widest, fits), options)


def _launch(probe: Tensor, k: Tensor, block_size: int = 1) -> tuple[tuple[int, int], Shape, dict[str, int]]:
    """Grid, constants and options of a launch."""
    batch, probes, heads, dim = probe.shape
    capability = torch.cuda.get_device_capability(k.device) if k.is_cuda else (0, 0)
    tiles = probe_tiles(probes, dim, k.element_size(), capability, block_size)
    kv_heads, precision = k.shape[2], "ieee" if k.dtype == torch.float32 else "tf32"
    constants = (
        block_size,
        kv_heads,
        heads // kv_heads,
        dim,
        padded(dim),
        tiles.queries,
        tiles.keys,
        precision,
    )
    grid = (triton.cdiv(k.shape[1], tiles.keys), batch * kv_heads)
    return grid, Shape(*constants), tiles.options


def _scope(scope: ProbeScope | None) -> Scope:
    """``scope`` as kernels take it."""
    if scope is None:
        return Scope(None, None, None)
    return Scope(scope.first_keys.contiguous(), scope.bases.contiguous(), scope.reach.contiguous())


def probe_lse(
    probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float,
    scope: ProbeScope | None = None,
) -> Tensor:  # fmt: skip
    """See :meth:`mtraining.kernel.backend.EstimationKernels.probe_lse`; unit stride along head_dim."""
    batch, probes, heads, _ = probe.shape
    grid, shape, options = _launch(probe, k)
    part = torch.empty(batch, heads, grid[0], probes, dtype=torch.float32, device=k.device)
    launch(probe_lse_kernel, grid)(
        strided(probe, fixed_row=False), strided(k, fixed_row=False), probe_positions, key_positions, _scope(scope),
        part, scale * LOG2E.value, probes, k.shape[1], grid[0], shape, **options,
    )  # fmt: skip
    lse = torch.empty(batch, heads, probes, dtype=torch.float32, device=k.device)
    launch(join_lse_kernel, (triton.cdiv(probes, 16), batch * heads))(
        part, lse, probes, grid[0], BLOCK_P=16, BLOCK_T=64, num_warps=4
    )
    return lse


def probe_mass(
    probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float, lse: Tensor,
    seq_len: int, block_size: int, scope: ProbeScope | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :meth:`mtraining.kernel.backend.EstimationKernels.probe_mass`; unit stride along head_dim.

    Raises:
        UserError: a block size that no tile of keys divides.
    """
    if block_size > 1:
        check_block_size(block_size)
    batch, probes, heads, _ = probe.shape
    grid, shape, options = _launch(probe, k, block_size)
    columns = torch.empty(batch * heads, k.shape[1], dtype=torch.float32, device=k.device)
    slashes = seq_len // block_size if scope is None else scope.slots
    totals = torch.zeros(batch * heads, slashes, dtype=torch.int64, device=k.device)
    # A probe query adds a probability of at most one to any slash: their sum stays below 2^62.
    unit = 2.0 ** (61 - probes.bit_length())
    launch(probe_mass_kernel, grid)(
        strided(probe, fixed_row=False), strided(k, fixed_row=False), probe_positions, key_positions, _scope(scope),
        lse, columns, totals, scale * LOG2E.value, unit, probes, k.shape[1], totals.shape[1], shape, **options,
    )  # fmt: skip
    return columns, totals.to(torch.float32).mul_(1.0 / unit)
