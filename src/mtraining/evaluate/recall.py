"""How much of the true attention an index keeps, on rows that its estimate has not seen."""

from __future__ import annotations

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex


def held_out_rows(seq_len: int, count: int, probe: Tensor, seed: int = 0) -> Tensor:
    """Random query rows outside the probe: int64 (min(count, rows there are),), ascending, on the probe's device."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(seq_len, generator=generator)
    outside = order[~torch.isin(order, probe.cpu())]
    return outside[:count].sort().values.to(probe.device)


def attention_rows(
    q: Tensor, k: Tensor, rows: Tensor, head: int, scale: float, starts: Tensor | None = None
) -> Tensor:
    """The true causal softmax of some rows of one head of the first sequence: fp32 (len(rows), tokens).

    Args:
        q: (batch, tokens, q_heads, head_dim).
        k: (batch, tokens, kv_heads, head_dim).
        starts: integers (tokens,), the first key that each query of the sequence may attend; None: 0.
    """
    kv_head = head // (q.shape[2] // k.shape[2])
    scores = q[0, rows, head].float() @ k[0, :, kv_head].float().T * scale
    token = torch.arange(k.shape[1], device=k.device)
    hidden = token > rows[:, None]
    if starts is not None:
        hidden |= token < starts[rows, None]
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1)


def index_recall(index: SparseIndex, attention: Tensor, rows: Tensor) -> Tensor:
    """Share of the true mass of each row that the index keeps: fp32 (q_heads, len(rows)), of the first sequence.

    Args:
        index: of the whole sequence, as one process has it.
        attention: fp32 (q_heads, len(rows), tokens), :func:`attention_rows` of every head.
    """
    size, seq_len = index.block_size, index.seq_len
    every = torch.arange(index.num_blocks, device=rows.device)
    tiles = index.tile_mask(every, every)[0][:, rows // size]  # (q_heads, rows, blocks)
    in_tiles = (attention.unflatten(-1, (-1, size)).sum(-1) * tiles).sum(-1)
    columns = index.columns[0].long()[:, None].expand(-1, rows.numel(), -1)
    place = columns.clamp(max=seq_len - 1)
    outside = (columns < seq_len) & ~tiles.gather(-1, place // size)  # padding, and what a tile holds already
    return in_tiles + (attention.gather(-1, place) * outside).sum(-1)
