"""Compact columns: the selected key and value rows of each query head side by side, and the way back for gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtraining.kernel.triton.launch import launch
from mtraining.kernel.triton.tile_sizes import padded

_ROWS = 32  # columns, or keys, a program handles


@triton.jit
def _column_slot(column_ptr, slot_ptr, row, column, capacity, seq_len):
    """Local place of each column, -1 for padding and for columns held elsewhere."""
    there = column < capacity
    position = tl.load(column_ptr + row * capacity + column, mask=there, other=seq_len).to(tl.int64)
    return tl.load(slot_ptr + position, mask=position < seq_len, other=-1)


# The number of columns may change from step to step (`pattern.anneal.widen`): it is not compiled in.
@triton.jit(do_not_specialize=["capacity"])
def gather_kernel(
    k_ptr, v_ptr, column_ptr, slot_ptr, out_ptr, k_b, k_s, k_h, v_b, v_s, v_h, out_x, capacity, seq_len,
    Q_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (query heads, column tiles, batch): heads of one tile side by side write whole lines."""
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot = _column_slot(column_ptr, slot_ptr, batch * Q_HEADS + head, column, capacity, seq_len)[:, None]
    lane = tl.arange(0, BLOCK_D)[None, :]
    held = (slot >= 0) & (lane < HEAD_DIM)
    key = tl.load(k_ptr + batch * k_b + (head // GROUP) * k_h + slot * k_s + lane, mask=held, other=0.0)
    value = tl.load(v_ptr + batch * v_b + (head // GROUP) * v_h + slot * v_s + lane, mask=held, other=0.0)
    into = ((batch * capacity + column[:, None]) * Q_HEADS + head) * HEAD_DIM + lane
    there = (column < capacity)[:, None] & (lane < HEAD_DIM)
    tl.store(out_ptr + into, key, mask=there)
    tl.store(out_ptr + out_x + into, value, mask=there)


@triton.jit(do_not_specialize=["capacity"])
def invert_kernel(column_ptr, slot_ptr, place_ptr, capacity, seq_len, keys, ROWS: tl.constexpr):
    """Place among the columns of each (batch, query head) and local key.

    Columns that occur several times have gradients of zero, so it does not matter which of their places is found.
    """
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = _column_slot(column_ptr, slot_ptr, row, column, capacity, seq_len)
    tl.store(place_ptr + row * keys + slot, column, mask=slot >= 0)


@triton.jit
def scatter_kernel(
    grad_ptr, place_ptr, dk_ptr, dv_ptr, g_x, g_b, g_c, g_h, d_b, d_s, d_h, keys,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Key-major: each local key adds up what the query heads of its group hold for it, in the heads' order."""
    bh = tl.program_id(1)
    batch, kv_head = (bh // KV_HEADS).to(tl.int64), (bh % KV_HEADS).to(tl.int64)
    key = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK_D)[None, :]
    dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
    touched = tl.full([ROWS], 0, tl.int32)
    for g in tl.static_range(GROUP):
        head = kv_head * GROUP + g
        row = bh.to(tl.int64) * GROUP + g
        place = tl.load(place_ptr + row * keys + key, mask=key < keys, other=-1).to(tl.int64)
        held = (place >= 0)[:, None] & (lane < HEAD_DIM)
        source = grad_ptr + batch * g_b + head * g_h + place[:, None] * g_c + lane
        dk += tl.load(source, mask=held, other=0.0).to(tl.float32)
        dv += tl.load(source + g_x, mask=held, other=0.0).to(tl.float32)
        touched = touched | (place >= 0).to(tl.int32)
    mask = (touched > 0)[:, None] & (lane < HEAD_DIM)
    into = batch * d_b + kv_head * d_h + key[:, None].to(tl.int64) * d_s + lane
    dk_at, dv_at = dk_ptr + into, dv_ptr + into
    tl.store(dk_at, tl.load(dk_at, mask=mask, other=0.0) + dk, mask=mask)
    tl.store(dv_at, tl.load(dv_at, mask=mask, other=0.0) + dv, mask=mask)


def gather_columns(k: Tensor, v: Tensor, columns: Tensor, slots: Tensor) -> Tensor:
    """See :meth:`mtraining.kernel.backend.AttentionKernels.gather_columns`; unit stride along head_dim."""
    batch, q_heads, capacity = columns.shape
    dim = k.shape[3]
    out = torch.empty(2, batch, capacity, q_heads, dim, dtype=k.dtype, device=k.device)
    if capacity:
        launch(gather_kernel, (q_heads, triton.cdiv(capacity, _ROWS), batch))(
            k, v, columns, slots, out, *k.stride()[:3], *v.stride()[:3], out.stride(0), capacity, slots.numel(),
            Q_HEADS=q_heads, GROUP=q_heads // k.shape[2], HEAD_DIM=dim, BLOCK_D=padded(dim), ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
    return out


def scatter_columns(grads: Tensor, columns: Tensor, slots: Tensor, dkv: Tensor) -> None:
    """See :meth:`mtraining.kernel.backend.AttentionKernels.scatter_columns`; unit stride along head_dim."""
    batch, q_heads, capacity = columns.shape
    keys, kv_heads, dim = dkv.shape[2:]
    if dkv.stride(-1) != 1:
        raise ValueError("dkv: it is added to in place and needs unit stride along head_dim.")
    if capacity == 0:
        return
    places = torch.full((batch, q_heads, keys), -1, dtype=torch.int32, device=dkv.device)
    launch(invert_kernel, (triton.cdiv(capacity, 1024), batch * q_heads))(
        columns, slots, places, capacity, slots.numel(), keys, ROWS=1024, num_warps=4
    )
    launch(scatter_kernel, (triton.cdiv(keys, _ROWS), batch * kv_heads))(
        grads, places, *dkv, *grads.stride()[:4], *dkv.stride()[1:4], keys,
        KV_HEADS=kv_heads, GROUP=q_heads // kv_heads, HEAD_DIM=dim, BLOCK_D=padded(dim), ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
