"""XAttention (arXiv 2503.16428): blocks chosen by the sums of their antidiagonals.

Section 2.1 of the paper: in every stride x stride square of the score matrix the scores on the antidiagonal are
summed, so each token has a part in it and every vertical and slash crosses it. With S the stride, square (i, j)
has the score

    a(i, j) = scale / S * sum over s < S of q[i S + S - 1 - s] . k[j S + s].

Section 2.2: a softmax over j of the causal squares (j <= i); block (I, J) has the sum over its squares; each
row of blocks keeps the fewest blocks whose sum reaches the threshold of the row's total. As in the authors'
code the first block and the query's own are always kept and count first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex
from mtraining.kernel.reference import accumulation_dtype
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.blocks import grouped_products, heaviest_blocks

_KEY_BLOCKS = 256  # key blocks of the whole sequence that are scored at a time


@dataclass(frozen=True)
class XAttention(Pattern):
    """Blocks by antidiagonal mass.

    The score of a square is one product of stride * head_dim numbers with all of its keys in it, so every rank
    must meet every key once: kv_heads * head_dim numbers a token, which is half of what one forward ring moves
    (268 MB a layer for 512K tokens, 2 kv heads of 128 in bf16). They come in pieces of 256 blocks and are
    dropped after scoring; nobody holds all of them. What stays is 4 bytes for each row of squares and block of
    the sequence, for the query heads of one kv head at a time: 134 MB for 8 heads at 512K tokens over 32 ranks.
    Each rank chooses for its own queries.

    Attributes:
        stride: side of the squares, a divisor of ``block_size``; the estimate multiplies 1 / stride of all scores.
        threshold: share of a row's estimated mass to keep; 1 keeps every block.
    """

    stride: int = 16
    threshold: float = 0.9

    name = "xattention"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.stride >= 1 and self.block_size % self.stride == 0
        require(self, "stride", fits, f"use a divisor of pattern.block_size={self.block_size}, such as 16")
        require(
            self, "threshold", 0 < self.threshold <= 1, "use a share of the mass between 0 and 1, such as 0.9"
        )

    @torch.no_grad()
    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        mass = antidiagonal_mass(q, k, shard, scale, self.block_size, self.stride)
        key = torch.arange(mass.shape[-1], device=q.device)
        own = shard.all_blocks(self.block_size)[shard.comm.rank]
        forced = (key == 0) | (key == own[:, None])
        return shard.block_index(self.block_size, heaviest_blocks(mass, forced, self.threshold))


def antidiagonal_mass(
    q: Tensor, k: Tensor, shard: SequenceShard, scale: float, block_size: int, stride: int
) -> Tensor:
    """Estimated mass of each block under this rank's queries: (batch, q_heads, local blocks, blocks), fp32 or fp64.

    A row sums to the block's rows of squares, block_size / stride. Collective over ``shard.comm``.
    """
    batch, tokens, q_heads, _ = q.shape
    kv_heads, group = k.shape[2], q_heads // k.shape[2]
    squares, num_blocks = block_size // stride, shard.seq_len // block_size
    local_blocks, all_blocks = tokens // block_size, shard.all_blocks(block_size)
    inside = torch.arange(squares, device=q.device)
    row = (all_blocks[shard.comm.rank][:, None] * squares + inside).flatten()
    queries = q.unflatten(1, (-1, stride)).flip(2)  # (batch, rows of squares, stride, q_heads, head_dim)
    width = max(1, _KEY_BLOCKS // shard.comm.world)
    mass = []
    for head in range(kv_heads):
        mine = queries[..., head * group : (head + 1) * group, :].transpose(2, 3).flatten(3)
        by_block = q.new_empty(
            batch, group, row.numel(), num_blocks, dtype=accumulation_dtype(q.dtype)
        )  # log of the summed exponents
        for first in range(0, local_blocks, width):
            piece = k[:, first * block_size : (first + width) * block_size, head].contiguous()
            keys = shard.comm.all_gather(piece).transpose(0, 1).reshape(batch, -1, 1, stride * k.shape[3])
            blocks = all_blocks[:, first : first + width].flatten()
            column = (blocks[:, None] * squares + inside).flatten()
            scores = grouped_products(mine, keys) * (scale / stride)
            scores.masked_fill_(column > row[:, None], -torch.inf)
            by_block[..., blocks] = scores.unflatten(-1, (-1, squares)).logsumexp(-1)
        share = (by_block - by_block.logsumexp(-1, keepdim=True)).exp_()
        mass.append(share.unflatten(2, (local_blocks, squares)).sum(3))
    return torch.cat(mass, 1)
