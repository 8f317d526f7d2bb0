"""Scores of a few probe queries against all local keys, in two passes that store no probabilities.

One program takes one tile of keys of one kv head and every query head that reads it, so keys come from memory once a
pass; the probe's queries, a few KiB a head, come from the cache. Sums over distances are taken along the diagonals of
the score tile and added to int64 fixed-point totals: integer additions commute, so the result repeats bit for bit
whatever the order of programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtraining.kernel.triton_common import LN2, LOG2E, load_tile_rows, tile_offsets
from mtraining.kernel.triton_config import interpreted, padded


@triton.jit
def _probe_tile(
    probe_ptr, q_b, q_p, q_h, k_tile, key_at, probe_pos_ptr, batch, head, probe_tile, probes, key_there,
    scale_log2, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in units of log2 (BLOCK_M, BLOCK_N), -inf where a key does not count, and the probe's positions."""
    first, row = (probe_tile * BLOCK_M).to(tl.int64), tl.arange(0, BLOCK_M)
    left = probes - probe_tile * BLOCK_M
    probe_at = tl.load(probe_pos_ptr + first + row, mask=row < left, other=-1).to(tl.int32)
    base = probe_ptr + batch * q_b + head * q_h + first * q_p
    q = load_tile_rows(base, tile_offsets(q_p, BLOCK_M, BLOCK_D), left, HEAD_DIM, BLOCK_D)
    scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale_log2
    seen = (key_at[None, :] <= probe_at[:, None]) & key_there[None, :]
    return tl.where(seen, scores, float("-inf")), probe_at


@triton.jit
def probe_lse_kernel(
    probe_ptr, k_ptr, probe_pos_ptr, key_pos_ptr, part_ptr, q_b, q_p, q_h, k_b, k_s, k_h,
    scale_log2, probes, keys, tiles, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log2-sum-exp2 of every probe query over one tile of keys: part (batch, q_heads, tiles, probes)."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (bh // KV_HEADS).to(tl.int64), (bh % KV_HEADS).to(tl.int64)
    first = tile.to(tl.int64) * BLOCK_N
    left = keys - tile * BLOCK_N
    column = tl.arange(0, BLOCK_N)
    key_at = tl.load(key_pos_ptr + first + column, mask=column < left, other=0).to(tl.int32)
    k_base = k_ptr + batch * k_b + kv_head * k_h + first * k_s
    k_tile = load_tile_rows(k_base, tile_offsets(k_s, BLOCK_N, BLOCK_D), left, HEAD_DIM, BLOCK_D)
    probe_tiles = tl.cdiv(probes, BLOCK_M)
    for step in range(GROUP * probe_tiles):
        head = kv_head * GROUP + step // probe_tiles
        probe_tile = step % probe_tiles
        scores, _ = _probe_tile(
            probe_ptr, q_b, q_p, q_h, k_tile, key_at, probe_pos_ptr, batch, head, probe_tile, probes,
            column < left, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
        )  # fmt: skip
        top = tl.max(scores, 1)
        empty = top == float("-inf")
        total = tl.sum(tl.exp2(scores - tl.where(empty, 0.0, top)[:, None]), 1)
        part = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
        row = probe_tile * BLOCK_M + tl.arange(0, BLOCK_M)
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
def _add_diagonals(total_ptr, prob, shift, distance, unit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
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
def _add_entries(
    total_ptr, prob, probe_pos_ptr, key_at, rows, unit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Add each entry of ``prob`` on its own: for queries or keys at scattered positions."""
    lane = tl.arange(0, 16)
    for first in range(0, BLOCK_M, 16):  # a slice of rows at a time: a whole tile of addresses would not fit
        index = tl.broadcast_to((first + lane)[:, None], [16, BLOCK_N])
        part = tl.gather(prob, index, 0)
        probe_at = tl.load(probe_pos_ptr + first + lane, mask=first + lane < rows, other=0).to(tl.int32)
        at = total_ptr + (probe_at[:, None] - key_at[None, :])
        tl.atomic_add(at, (part * unit).to(tl.int64), mask=part > 0.0, sem="relaxed")


@triton.jit
def probe_mass_kernel(
    probe_ptr, k_ptr, probe_pos_ptr, key_pos_ptr, lse_ptr, column_ptr, total_ptr, q_b, q_p, q_h, k_b, k_s, k_h,
    scale_log2, unit, probes, keys, seq_len, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probability by key: column (batch * q_heads, keys) fp32; by distance: total (batch * q_heads, seq_len) int64."""
    tile, bh = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (bh // KV_HEADS).to(tl.int64), (bh % KV_HEADS).to(tl.int64)
    first = tile.to(tl.int64) * BLOCK_N
    left = keys - tile * BLOCK_N
    column = tl.arange(0, BLOCK_N)
    key_at = tl.load(key_pos_ptr + first + column, mask=column < left, other=0).to(tl.int32)
    key_start = tl.load(key_pos_ptr + first).to(tl.int32)
    keys_astray = tl.sum(((key_at != key_start + column) & (column < left)).to(tl.int32), 0)
    k_base = k_ptr + batch * k_b + kv_head * k_h + first * k_s
    k_tile = load_tile_rows(k_base, tile_offsets(k_s, BLOCK_N, BLOCK_D), left, HEAD_DIM, BLOCK_D)
    probe_tiles = tl.cdiv(probes, BLOCK_M)
    columns = tl.zeros([BLOCK_N], tl.float32)
    for step in range(GROUP * probe_tiles):
        head_row = bh.to(tl.int64) * GROUP + step // probe_tiles
        probe_tile = step % probe_tiles
        scores, probe_at = _probe_tile(
            probe_ptr, q_b, q_p, q_h, k_tile, key_at, probe_pos_ptr, batch,
            kv_head * GROUP + step // probe_tiles, probe_tile, probes, column < left, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION,
        )  # fmt: skip
        lane = tl.arange(0, BLOCK_M)
        row = probe_tile * BLOCK_M + lane
        lse2 = tl.load(lse_ptr + head_row * probes + row, mask=row < probes, other=0.0)
        lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2 * LOG2E)
        prob = tl.exp2(scores - lse2[:, None])
        # A head's last probe tile is the one whose store stays: the running sum then covers all of them.
        columns = tl.where(probe_tile == 0, 0.0, columns) + tl.sum(prob, 0)
        tl.store(column_ptr + head_row * keys + first + column, columns, mask=column < left)
        probe_start = tl.load(probe_pos_ptr + probe_tile * BLOCK_M).to(tl.int32)
        probes_astray = tl.sum(((probe_at != probe_start + lane) & (row < probes)).to(tl.int32), 0)
        totals = total_ptr + head_row * seq_len
        if keys_astray + probes_astray == 0:
            # The row numbers, but loaded: indices known before the loop would be kept in registers throughout it.
            shift = probe_at - probe_start
            _add_diagonals(totals, prob, shift, probe_start - key_start, unit, BLOCK_M, BLOCK_N)
        else:
            starts = probe_pos_ptr + probe_tile * BLOCK_M
            _add_entries(totals, prob, starts, key_at, probes - probe_tile * BLOCK_M, unit, BLOCK_M, BLOCK_N)


class _Tiles(NamedTuple):
    queries: int
    keys: int
    warps: int


def _tiles(probes: int, head_dim: int, itemsize: int) -> _Tiles:
    """Score tile of a program; its operands stay within 128 KiB of shared memory."""
    if itemsize == 4 and not interpreted():  # exact fp32 products, no tensor cores
        return _Tiles(32, 32, 4)
    queries = max(16, min(64, triton.next_power_of_2(probes)))
    return _Tiles(queries, 128 if head_dim <= 128 else 64, 4)


def _launch(probe: Tensor, k: Tensor) -> tuple[tuple[int, int], dict[str, object]]:
    batch, probes, heads, dim = probe.shape
    tiles = _tiles(probes, dim, k.element_size())
    constants: dict[str, object] = {
        "KV_HEADS": k.shape[2], "GROUP": heads // k.shape[2], "HEAD_DIM": dim, "BLOCK_D": padded(dim),
        "BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys, "PRECISION": "ieee" if k.dtype == torch.float32 else "tf32",
        "num_warps": tiles.warps, "num_stages": 2,
    }  # fmt: skip
    return (triton.cdiv(k.shape[1], tiles.keys), batch * k.shape[2]), constants


def probe_lse(
    probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float
) -> Tensor:
    """See :meth:`mtraining.kernel.backend.Backend.probe_lse`; probe and k with unit stride along head_dim."""
    batch, probes, heads, _ = probe.shape
    grid, constants = _launch(probe, k)
    part = torch.empty(batch, heads, grid[0], probes, dtype=torch.float32, device=k.device)
    probe_lse_kernel[grid](
        probe, k, probe_positions, key_positions, part, *probe.stride()[:3], *k.stride()[:3],
        scale * LOG2E.value, probes, k.shape[1], grid[0], **constants,
    )  # fmt: skip
    lse = torch.empty(batch, heads, probes, dtype=torch.float32, device=k.device)
    join_lse_kernel[(triton.cdiv(probes, 16), batch * heads)](
        part, lse, probes, grid[0], BLOCK_P=16, BLOCK_T=64, num_warps=4
    )
    return lse


def probe_mass(
    probe: Tensor,
    k: Tensor,
    probe_positions: Tensor,
    key_positions: Tensor,
    scale: float,
    lse: Tensor,
    seq_len: int,
) -> tuple[Tensor, Tensor]:
    """See :meth:`mtraining.kernel.backend.Backend.probe_mass`; probe and k with unit stride along head_dim."""
    batch, probes, heads, _ = probe.shape
    grid, constants = _launch(probe, k)
    columns = torch.empty(batch * heads, k.shape[1], dtype=torch.float32, device=k.device)
    totals = torch.zeros(batch * heads, seq_len, dtype=torch.int64, device=k.device)
    # At most `probes` probabilities meet at one distance: their sum stays below 2^62.
    unit = 2.0 ** (61 - probes.bit_length())
    probe_mass_kernel[grid](
        probe, k, probe_positions, key_positions, lse, columns, totals, *probe.stride()[:3], *k.stride()[:3],
        scale * LOG2E.value, unit, probes, k.shape[1], seq_len, **constants,
    )  # fmt: skip
    return columns, totals.to(torch.float32).mul_(1.0 / unit)
