"""Caches for tests of decoding: what lies beyond a row's keys is NaN, so that reading it shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def decode_case(
    q_heads: int, kv_heads: int, dim: int, lengths: Sequence[int], *, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (batch, q_heads, dim), k and v (batch, capacity, kv_heads, dim), lengths int32 (batch,)."""
    generator = torch.Generator().manual_seed(5)
    batch, capacity = len(lengths), max(lengths) + 3
    q = torch.randn(batch, q_heads, dim, generator=generator)
    k, v = (torch.randn(batch, capacity, kv_heads, dim, generator=generator) for _ in range(2))
    for row, length in enumerate(lengths):
        k[row, length:] = torch.nan
        v[row, length:] = torch.nan
    cache = [x.to(device, dtype) for x in (q, k, v)]
    return cache[0], cache[1], cache[2], torch.tensor(lengths, dtype=torch.int32, device=device)
