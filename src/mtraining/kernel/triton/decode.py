"""Split-K decode: one new query a row over a long cache, at the speed at which memory gives the cache away.

A program takes one kv head and one run of consecutive keys, and reads each key and value once for all query heads of
its group. Runs are short enough that every multiprocessor has several. A second, small kernel joins the partial
results of a head's runs by their log-sum-exps, as Flash-Decoding does (Dao, Haziza, Massa, Sizov, 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtraining.kernel.triton.common import LN2, LOG2E, load_tile_rows, softmax_step, tile_offsets
from mtraining.kernel.triton.launch import launch
from mtraining.kernel.triton.tile_sizes import interpreted, padded

_WAVES = 4  # programs wanted for each multiprocessor
_BLOCK_S = 16  # partial results joined at a time


@triton.jit(do_not_specialize=["splits", "run"])
def decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, firsts_ptr, part_ptr, part_lse_ptr, q_b, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    scale_log2, run, splits, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One run of one kv head: part (batch, q_heads, splits, head_dim) and part_lse (batch, q_heads, splits), fp32.

    Keys are counted from ``firsts`` on, if that is not None: ``lengths`` of them in each row.
    ``run``: keys of a program, a multiple of BLOCK_N. Runs past a row's length are not written.
    """
    split, bh = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (bh // KV_HEADS).to(tl.int64), (bh % KV_HEADS).to(tl.int64)
    length = tl.load(lengths_ptr + batch)
    first = split * run
    if first >= length:
        return
    last = tl.minimum(first + run, length)

    # Queries of the group, padded to what a product takes: [BLOCK_G, BLOCK_D]
    head = tl.arange(0, BLOCK_G)
    lane = tl.arange(0, BLOCK_D)
    q_at = q_ptr + batch * q_b + (kv_head * GROUP + head)[:, None] * q_h + lane[None, :]
    q = tl.load(q_at, mask=(head < GROUP)[:, None] & (lane < HEAD_DIM)[None, :], other=0.0)

    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    k_base = k_ptr + batch * k_b + kv_head * k_h + first.to(tl.int64) * k_s
    v_base = v_ptr + batch * v_b + kv_head * v_h + first.to(tl.int64) * v_s
    if firsts_ptr is not None:
        skipped = tl.load(firsts_ptr + batch).to(tl.int64)
        k_base += skipped * k_s
        v_base += skipped * v_s
    k_offsets = tile_offsets(k_s, BLOCK_N, BLOCK_D)
    v_offsets = tile_offsets(v_s, BLOCK_N, BLOCK_D)
    for start in range(first, last, BLOCK_N):
        left = last - start
        k = load_tile_rows(k_base, k_offsets, left, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_G, BLOCK_N]
        scores = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, scores, float("-inf"))
        v = load_tile_rows(v_base, v_offsets, left, HEAD_DIM, BLOCK_D)
        # The first key of a tile is always there, so no row is hidden throughout.
        acc, top, total = softmax_step(acc, top, total, scores, v, scale_log2, False, PRECISION)
        k_base += BLOCK_N * k_s
        v_base += BLOCK_N * v_s

    row = (batch * KV_HEADS * GROUP + kv_head * GROUP + head) * splits + split
    held = head < GROUP
    tl.store(part_lse_ptr + row, (top + tl.log2(total)) * LN2, mask=held)
    part_at = part_ptr + row[:, None] * HEAD_DIM + lane[None, :]
    tl.store(part_at, acc / total[:, None], mask=held[:, None] & (lane < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["splits", "run"])
def join_kernel(
    part_ptr, part_lse_ptr, lengths_ptr, out_ptr, lse_ptr, run, splits, Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Join the runs of one query head: out (batch, q_heads, head_dim), lse (batch, q_heads), fp32."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + row // Q_HEADS)
    count = tl.cdiv(length, run)  # runs that were written
    lane, step = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    acc = tl.zeros([BLOCK_D], tl.float32)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, count, BLOCK_S):
        there = start + step < count
        at = row * splits + start + step
        lse2 = tl.load(part_lse_ptr + at, mask=there, other=float("-inf")) * LOG2E  # [BLOCK_S]
        part = tl.load(
            part_ptr + at[:, None] * HEAD_DIM + lane[None, :],
            mask=there[:, None] & (lane < HEAD_DIM)[None, :],
            other=0.0,
        )  # [BLOCK_S, BLOCK_D]
        new_top = tl.maximum(top, tl.max(lse2, 0))
        weight = tl.exp2(lse2 - new_top)
        alpha = tl.exp2(top - new_top)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        total = total * alpha + tl.sum(weight, 0)
        top = new_top
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)
    tl.store(out_ptr + row * HEAD_DIM + lane, acc, mask=lane < HEAD_DIM)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    tl.store(lse_ptr + row + tl.arange(0, 1), lse)


class DecodeTiles(NamedTuple):
    """Keys of a tile, and launch options of the kernel that reads them."""

    keys: int
    options: dict[str, int]


def decode_tiles(head_dim: int, itemsize: int) -> DecodeTiles:
    """Tiles whose two operands, as many stages deep as are in flight, stay within 96 KiB of shared memory."""
    if itemsize == 4 and not interpreted():  # exact fp32 products, no tensor cores
        return DecodeTiles(32 if padded(head_dim) <= 128 else 16, {"num_warps": 4, "num_stages": 2})
    if padded(head_dim) <= 128:
        return DecodeTiles(64, {"num_warps": 4, "num_stages": 3 if padded(head_dim) == 128 else 4})
    return DecodeTiles(32, {"num_warps": 4, "num_stages": 3})


def runs(longest: int, rows: int, tile: int, multiprocessors: int) -> tuple[int, int]:
    """(keys of a run, runs of a row): enough programs for every multiprocessor, none shorter than a tile.

    Args:
        rows: batch times kv heads.
    """
    tiles = max(1, -(-longest // tile))
    wanted = max(1, _WAVES * multiprocessors // rows)
    run = max(1, tiles // wanted) * tile
    return run, max(1, -(-longest // run))


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int, scale: float, firsts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :class:`mtraining.kernel.backend.Decode`; results repeat bit for bit, and nothing waits for the device."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    batch, q_heads, dim = q.shape
    kv_heads, group = k.shape[2], q_heads // k.shape[2]
    tiles = decode_tiles(dim, k.element_size())
    if firsts is not None:
        lengths = (lengths - firsts).clamp_(min=0)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    run, splits = runs(longest, batch * kv_heads, tiles.keys, processors)
    part = torch.empty(batch, q_heads, splits, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(batch, q_heads, splits, dtype=torch.float32, device=q.device)
    launch(decode_kernel, (splits, batch * kv_heads))(
        q, k, v, lengths, firsts, part, part_lse, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        scale * LOG2E.value, run, splits, KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=dim, BLOCK_D=padded(dim),
        BLOCK_G=max(16, triton.next_power_of_2(group)), BLOCK_N=tiles.keys,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **tiles.options,
    )  # fmt: skip
    out = torch.empty(batch, q_heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, q_heads, dtype=torch.float32, device=q.device)
    launch(join_kernel, (batch * q_heads,))(
        part, part_lse, lengths, out, lse, run, splits, Q_HEADS=q_heads, HEAD_DIM=dim, BLOCK_D=padded(dim),
        BLOCK_S=_BLOCK_S, num_warps=4,
    )  # fmt: skip
    return out, lse
