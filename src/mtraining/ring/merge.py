"""Partial attention of every rank, each over its own keys, as one result on all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from mtraining.ring.topology import Ring


def merge_over_ring(out: Tensor, lse: Tensor, ring: Ring) -> Tensor:
    """Attention over the keys of all ranks, the same bits on each; one all-gather. Collective.

    Args:
        out: (batch, q_heads, head_dim), normalised over this rank's keys, in the accumulation dtype.
        lse: (batch, q_heads), natural log; -inf (with out = 0) where this rank has no key.

    Returns:
        (batch, q_heads, head_dim); 0 where no rank has a key.
    """
    if ring.world == 1:
        return out
    parts = ring.all_gather(torch.cat([out, lse[..., None]], -1))  # [world, batch, q_heads, head_dim + 1]
    outs, lses = parts[..., :-1], parts[..., -1]
    whole = lses.logsumexp(0)
    weight = (lses - torch.where(torch.isneginf(whole), 0.0, whole)).exp()
    return (outs * weight[..., None]).sum(0)
