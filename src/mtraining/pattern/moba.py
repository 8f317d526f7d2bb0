"""MoBA, mixture of block attention (arXiv 2502.13189): each query reads the chunks whose mean key it matches best.

Section 2.2 of the paper: keys are cut into chunks; the gate of query q and chunk i is s_i = <q, mean(K_i)> (eq.
6); chunks in the query's future are shut out, its own chunk is always chosen and counts as one of the top k
(eq. 5 and the causality rules below it).

The paper chooses for each query alone, and so does the MTraining baseline. That baseline packs queries by chunk for a
variable-length kernel, and gathers all keys and values on every rank to compute the gate. Here a block of
``block_size`` queries chooses together, by the mean of its queries' gates, which is the gate of its mean query. Every
block reads exactly ``top_k`` chunks, as every query does in the paper. With ``block_size`` 1 the two definitions are
one.

Where documents are packed, each has chunks of its own, counted from the block that holds its first token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex, pack_blocks
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.blocks import grouped_products, key_means, query_means
from mtraining.pattern.documents import Documents

_GATES = 2**26  # gates that are in memory at a time


@dataclass(frozen=True)
class MoBA(Pattern):
    """Top-k chunks by mean-pooled keys.

    Each rank sums its own keys by chunk; only the sums travel: 4 * kv_heads * head_dim bytes a chunk and batch
    row, 128 KiB a layer for 512K tokens, chunks of 4096, 2 kv heads of 128. Each rank chooses for its own
    queries.

    Attributes:
        chunk: keys in a chunk, a multiple of ``block_size``; the last chunk may be shorter.
        top_k: chunks a query block reads, its own included; MTraining's baseline has 12 at 512K tokens, 6 at 256K.
    """

    chunk: int = 4096
    top_k: int = 12

    name = "moba"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.chunk >= 1 and self.chunk % self.block_size == 0
        require(self, "chunk", fits, f"use a multiple of pattern.block_size={self.block_size}, such as 4096")
        require(self, "top_k", self.top_k >= 1, "use at least 1, the query's own chunk")

    @torch.no_grad()
    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        if shard.documents is not None:
            return self._estimate_documents(q, k, shard, shard.documents)
        per_chunk = self.chunk // self.block_size
        num_blocks = shard.seq_len // self.block_size
        chunk = torch.arange(-(-num_blocks // per_chunk), device=q.device)
        own = shard.all_blocks(self.block_size)[shard.comm.rank] // per_chunk
        queries = query_means(q, self.block_size, shard)
        gate = grouped_products(queries, self._chunk_means(k, chunk, own, num_blocks, shard))
        future, present = chunk > own[:, None], chunk == own[:, None]
        gate = gate.masked_fill(future, -torch.inf).masked_fill(present, torch.inf)
        best = gate.topk(min(self.top_k, chunk.numel()), -1).indices
        # where the past has fewer chunks than top_k, future ones fill up: an index ignores what lies ahead
        chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best, True)
        return shard.block_index(
            self.block_size, chosen.repeat_interleave(per_chunk, -1)[..., :num_blocks].contiguous()
        )

    def _chunk_means(
        self, k: Tensor, chunk: Tensor, own: Tensor, num_blocks: int, shard: SequenceShard
    ) -> Tensor:
        """Mean key of every chunk, on every rank: (batch, chunks, kv_heads, head_dim)."""
        means = key_means(k, self.block_size, shard)
        belongs = (chunk[:, None] == own).to(means.dtype)
        # a product adds in a fixed order, a scatter would not
        sums = shard.comm.all_sum(torch.einsum("cn,bnhd->bchd", belongs, means))
        per_chunk = self.chunk // self.block_size
        blocks_in_chunk = (num_blocks - chunk * per_chunk).clamp(max=per_chunk)
        return sums / blocks_in_chunk[:, None, None]

    def _estimate_documents(
        self, q: Tensor, k: Tensor, shard: SequenceShard, documents: Documents
    ) -> SparseIndex:
        """Chunks are named by their first block, of which there is only one a block."""
        size, per_chunk = self.block_size, self.chunk // self.block_size
        num_blocks = shard.seq_len // size
        block = torch.arange(num_blocks, device=q.device)
        own = shard.all_blocks(size)[shard.comm.rank]
        # A block's keys are those of its tail, its queries those of its lead.
        chunk_of_key = _chunk(documents.first[:, size - 1 :: size] // size, block, per_chunk)
        first = documents.first[:, own * size] // size  # (batch, rows)
        present = _chunk(first, own, per_chunk)[..., None] == block
        nearest = documents.starts[:, own * size, None] // size
        past = (block >= first[..., None]) & (block < own[:, None]) & (block + per_chunk > nearest) & ~present
        means = self._means_by_name(k, chunk_of_key, own, shard)
        queries = query_means(q, size, shard)

        def of_heads(kv: slice) -> Tensor:
            heads = slice(kv.start * group, kv.stop * group)
            gate = grouped_products(queries[:, :, heads], means[:, :, kv])
            gate = gate.masked_fill(~past[:, None], -torch.inf).masked_fill(present[:, None], torch.inf)
            # No chunk begins in a block that another chunk holds.
            gate = gate.masked_fill(~begins[:, None, None] & ~present[:, None], -torch.inf)
            best = gate.topk(min(self.top_k, num_blocks), -1).indices
            chosen = torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best, True) & (gate > -torch.inf)
            chosen = chosen.gather(-1, chunk_of_key[:, None, None].expand_as(chosen))
            return pack_blocks(chosen | (block == own[:, None]))

        begins, group = chunk_of_key == block, q.shape[2] // k.shape[2]
        width = max(1, _GATES // (q.shape[0] * group * own.numel() * num_blocks))
        lists = [of_heads(slice(h, min(h + width, k.shape[2]))) for h in range(0, k.shape[2], width)]
        none = torch.empty(q.shape[0], q.shape[2], 0, dtype=torch.int32, device=q.device)
        return shard.listed_index(size, torch.cat(lists, 1), none)

    def _means_by_name(self, k: Tensor, chunk_of_key: Tensor, own: Tensor, shard: SequenceShard) -> Tensor:
        """Mean key of the chunk that begins in each block, 0 where none does: (batch, blocks, kv_heads, head_dim)."""
        means = key_means(k, self.block_size, shard)
        block = torch.arange(chunk_of_key.shape[1], device=k.device)
        belongs = (block[:, None] == chunk_of_key[:, None, own]).to(means.dtype)
        sums = shard.comm.all_sum(torch.einsum("bcn,bnhd->bchd", belongs, means))
        count = torch.zeros_like(chunk_of_key).scatter_add_(1, chunk_of_key, torch.ones_like(chunk_of_key))
        return sums / count.clamp(min=1)[..., None, None]


def _chunk(first: Tensor, block: Tensor, per_chunk: int) -> Tensor:
    """First block of the chunk that each block of a document is in, whose first block is ``first``; int64."""
    return first + (block - first) // per_chunk * per_chunk
