"""Eager attention of one new query over a cache of keys: the specification of every decode kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from mtraining.kernel.reference.attention import accumulation_dtype


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int, scale: float, firsts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one query a row over a run of keys of a cache; see :class:`mtraining.kernel.backend.Decode`."""
    dtype = accumulation_dtype(q.dtype)
    batch, q_heads, dim = q.shape
    kv_heads = k.shape[2]
    # With runs that begin anywhere, the longest says nothing of where they end.
    end = longest if firsts is None else k.shape[1]
    keys, values = (x[:, :end].to(dtype) for x in (k, v))  # (batch, end, kv_heads, head_dim)
    grouped = q.to(dtype).view(batch, kv_heads, q_heads // kv_heads, dim)
    place = torch.arange(keys.shape[1], device=q.device)
    unused = place >= lengths[:, None]
    if firsts is not None:
        unused = unused | (place < firsts[:, None])
    # What lies beyond a row's run may be anything, NaN too, which a weight of 0 would not hide.
    values = values.masked_fill(unused[..., None, None], 0.0)
    scores = torch.einsum("bkgd,bskd->bkgs", grouped, keys) * scale
    scores = scores.masked_fill(unused[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1) if keys.shape[1] else scores.new_full(scores.shape[:-1], -torch.inf)
    safe = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    out = torch.einsum("bkgs,bskd->bkgd", (scores - safe[..., None]).exp(), values)
    return out.flatten(1, 2), lse.flatten(1, 2)
