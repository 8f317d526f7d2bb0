"""Compact columns, eager: their keys and values side by side, and the way back for their gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_columns(k: Tensor, v: Tensor, columns: Tensor, slots: Tensor) -> Tensor:
    """See :meth:`mtraining.kernel.backend.AttentionKernels.gather_columns`."""
    batch, q_heads, _ = columns.shape
    where, held = _column_slots(columns, slots)
    row = torch.arange(batch, device=k.device)[:, None, None]
    head = torch.arange(q_heads, device=k.device)[:, None] // (q_heads // k.shape[2])
    packed = torch.stack([x[row, where, head].transpose(1, 2) for x in (k, v)])
    zero = torch.zeros((), dtype=k.dtype, device=k.device)
    # Collectives ask for contiguous memory.
    return torch.where(held.transpose(1, 2)[..., None], packed, zero).contiguous()


def scatter_columns(grads: Tensor, columns: Tensor, slots: Tensor, dkv: Tensor) -> None:
    """See :meth:`mtraining.kernel.backend.AttentionKernels.scatter_columns`."""
    q_heads, kv_heads = columns.shape[1], dkv.shape[3]
    where, held = _column_slots(columns, slots)
    for grad, total in zip(grads, dkv, strict=True):
        zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
        kept = torch.where(held.transpose(1, 2)[..., None], grad, zero)
        for h in range(q_heads):
            into = where[:, h, :, None].expand(-1, -1, grad.shape[-1])
            total[:, :, h // (q_heads // kv_heads)].scatter_add_(1, into, kept[:, :, h])


def _column_slots(columns: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Local place of each column (0 where absent) and whether this rank holds it: (batch, q_heads, capacity) both."""
    seq_len = slots.numel()
    where = torch.where(columns < seq_len, slots[columns.clamp(max=seq_len - 1).long()], -1)
    return where.clamp(min=0), where >= 0
