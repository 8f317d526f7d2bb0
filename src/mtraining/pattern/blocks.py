"""What patterns that choose blocks share: pooled blocks, exact products, and the heaviest blocks of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from mtraining.kernel.reference.attention import accumulation_dtype
from mtraining.pattern.base import SequenceShard


def query_means(q: Tensor, block_size: int, shard: SequenceShard) -> Tensor:
    """(batch, tokens, heads, head_dim) -> means (batch, blocks, heads, head_dim), in fp32 (fp64 for fp64 inputs).

    Means are over the queries of a block that can look into earlier ones: its real tokens, and where there are
    documents those of its lead. A block of padding has 0.
    """
    own = shard.all_blocks(block_size)[shard.comm.rank]
    if shard.documents is None:
        return _means(shard.real(q), block_size, shard.real_in_block(block_size)[None])
    end = shard.documents.past[:, own * block_size].clamp(max=shard.length)
    counts = (end - own * block_size).clamp(min=0, max=block_size)
    return _means(shard.lead(q, block_size), block_size, counts)


def key_means(k: Tensor, block_size: int, shard: SequenceShard) -> Tensor:
    """The same over the keys that later blocks can look at: those of the tail where there are documents."""
    own = shard.all_blocks(block_size)[shard.comm.rank]
    if shard.documents is None:
        return _means(shard.real(k), block_size, shard.real_in_block(block_size)[None])
    end = (own + 1) * block_size
    first = torch.maximum(shard.documents.first[:, end - 1], own * block_size)
    counts = (end.clamp(max=shard.length) - first).clamp(min=0)
    return _means(shard.tail(k, block_size), block_size, counts)


def _means(x: Tensor, block_size: int, counts: Tensor) -> Tensor:
    """Means of blocks of which ``counts`` int64 (batch or 1, blocks) tokens are not zeroed."""
    means = x.unflatten(1, (-1, block_size)).mean(2, dtype=accumulation_dtype(x.dtype))
    return means * (block_size / counts.clamp(min=1))[..., None, None].to(means.dtype)


def gathered(means: Tensor, shard: SequenceShard, block_size: int) -> Tensor:
    """Means of every rank's blocks, in global order: (batch, blocks, heads, head_dim). Collective."""
    every = means.new_empty(means.shape[0], shard.seq_len // block_size, *means.shape[2:])
    every[:, shard.all_blocks(block_size).flatten()] = (
        shard.comm.all_gather(means).transpose(0, 1).flatten(1, 2)
    )
    return every


def grouped_products(q: Tensor, k: Tensor) -> Tensor:
    """q.k for every query head and its kv head, summed in fp32 (fp64 for fp64 inputs).

    Args:
        q: (batch, rows, q_heads, dim).
        k: (batch, keys, kv_heads, dim), same dtype.

    Returns:
        (batch, q_heads, rows, keys).
    """
    batch, rows, q_heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    left = q.transpose(1, 2).reshape(batch * kv_heads, q_heads // kv_heads * rows, dim)
    right = k.transpose(1, 2).reshape(batch * kv_heads, keys, dim)
    return products(left, right).view(batch, q_heads, rows, keys)


def products(left: Tensor, right: Tensor) -> Tensor:
    """(batch, m, dim) by (batch, n, dim) -> (batch, m, n), summed in fp32 (fp64 for fp64 inputs)."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):  # tensor cores, sums not rounded
        return torch.bmm(left, right.transpose(1, 2), out_dtype=torch.float32)
    dtype = accumulation_dtype(left.dtype)
    return left.to(dtype) @ right.to(dtype).transpose(1, 2)


def heaviest_blocks(mass: Tensor, forced: Tensor, share: float) -> Tensor:
    """The fewest blocks of each row whose mass reaches ``share`` of the row's total: bool, like ``mass``.

    Forced blocks come first and count towards the share; then the heaviest follow, the first ones among equals.
    From ``share`` 1 on every block is taken, rounding notwithstanding.

    Args:
        mass: (..., blocks), non-negative.
        forced: bool, broadcastable to ``mass``.
    """
    forced = forced.expand(mass.shape)
    if share >= 1:
        return torch.ones_like(forced)
    order = torch.where(forced, torch.inf, mass).sort(dim=-1, descending=True, stable=True).indices
    upto = mass.gather(-1, order).cumsum(-1)
    before = torch.nn.functional.pad(upto[..., :-1], (1, 0))
    wanted = before < share * mass.sum(-1, keepdim=True)
    return torch.zeros_like(forced).scatter(-1, order, wanted) | forced
