"""FlexPrefill (arXiv 2502.20766): each head query-aware or vertical-slash, by how well pooling predicts it.

The paper's sparse pattern search: the last block of queries (the last ``block_size`` real ones, where padding follows)
attends to all keys. Its true attention, summed over
each key block, is compared with the softmax of mean query times mean keys. Where the square root of their
Jensen-Shannon divergence is below tau, pooling can be trusted and the head is *query-aware*; else it is
*vertical-slash*.

Its vertical-slash index search: the fewest columns, and separately the fewest distances, whose share of the last
block's attention reaches gamma. Its query-aware index search: the softmax of mean queries times mean keys over all
causal block pairs, as one list over the whole map; the fewest pairs that reach gamma of its total. As in the
authors' code the first block of keys and the nearest block are always kept. The floor of 1,024 tokens in the
paper's experiments is left to a union with ``a_shape``.

Where documents are packed, all of this is done for each document (flexprefill_documents.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex, pack_blocks
from mtraining.pattern.base import Collective, Pattern, SequenceShard, require
from mtraining.pattern.blocks import gathered, grouped_products, key_means, query_means
from mtraining.pattern.diagonals import distances_to_diagonals
from mtraining.pattern.flexprefill_documents import estimate_documents
from mtraining.pattern.pooled import heaviest_pairs, jensen_shannon_distance
from mtraining.pattern.probe import column_and_slash_mass, gather_queries, share_choice, share_rows
from mtraining.pattern.refined import check_refine, refined_maps

_MAP = 2**24  # block pairs whose weights are in memory at a time


@dataclass(frozen=True)
class FlexPrefill(Pattern):
    """Query-aware or vertical-slash heads.

    What travels: every rank receives all mean keys, 4 * kv_heads * head_dim bytes a block. For 512K tokens and 2 kv
    heads of 128 these are 4 MB a layer. It takes part in the probe of the last block as in vertical_slash. The probe
    sends 4 bytes a head for each token of that block and of the sequence, heads rounded up to a multiple of the ranks.
    The cut of the query-aware map is searched bit by bit with 15 sums of 24 bytes a head. So
    no rank sees another's rows of the map.

    The map is made for so many heads at a time that it has 2^24 entries (67 MB, three times over). Each rank chooses
    for its own queries.

    Attributes:
        gamma: share of the attention to keep; 1 keeps everything.
        tau: largest root of the divergence at which a head is query-aware; 0 makes every head vertical-slash.
        max_columns: cap on the columns of a vertical-slash head; the paper has none, memory must.
        refine: super-blocks of keys that a row of the map looks into, at least 3; each has about as many blocks as the
            square root of their number. 0 makes the whole map, as the paper does.
    """

    gamma: float = 0.95
    tau: float = 0.1
    max_columns: int = 4096
    refine: int = 0

    name = "flexprefill"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "gamma", 0 < self.gamma <= 1, "use a share of the mass between 0 and 1, such as 0.95")
        require(self, "tau", self.tau >= 0, "use a distance from 0 up, such as 0.1")
        least = self.block_size
        require(self, "max_columns", self.max_columns >= least, f"the first block alone has {least} columns")
        check_refine(self, self.refine)

    @torch.no_grad()
    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        if shard.documents is not None:
            return estimate_documents(self, q, k, shard, scale)
        size, seq_len = self.block_size, shard.seq_len
        # Budgets are those of the blocks that hold a real token, however much padding follows.
        covered = shard.covered(size)
        batch, _, q_heads, _ = q.shape
        queries = query_means(q, size, shard)
        keys = gathered(key_means(k, size, shard), shard, size)
        last = torch.arange(max(0, shard.length - size), shard.length, device=q.device)
        probe = gather_queries(q, last, shard)
        verticals, slashes = column_and_slash_mass(q, k, last, shard, scale, probe=probe)
        verticals, slashes = verticals[:, :covered], slashes[:, :covered]
        true = share_rows(verticals.unflatten(1, (-1, size)).sum(-1) / len(last), batch, q_heads, shard)
        mean = probe.mean(1, keepdim=True, dtype=queries.dtype)
        estimated = grouped_products(mean, keys[:, : covered // size]).mul_(scale).softmax(-1)[:, :, 0]
        query_aware = jensen_shannon_distance(estimated, true) < self.tau
        lists = torch.cat(list(self._pooled_lists(queries, keys, shard, scale)), 1)
        columns, diagonals = self._vertical_slash(verticals, slashes, shard)
        columns, diagonals = share_choice(columns, diagonals, batch, q_heads, shard)
        vertical_slash = SparseIndex(covered, size, diagonals, columns).extended(seq_len)
        return shard.listed_index(
            size,
            lists * query_aware[..., None, None],
            vertical_slash.columns.masked_fill(query_aware[..., None], seq_len),
            vertical_slash.diagonals & ~query_aware[..., None],
        )

    def _pooled_lists(
        self, queries: Tensor, keys: Tensor, shard: SequenceShard, scale: float
    ) -> Iterator[Tensor]:
        """Blocks by pooled attention, packed: uint8 (batch, some query heads, local blocks, bytes). Collective.

        Args:
            queries: means of this rank's query blocks, (batch, local blocks, q_heads, head_dim).
            keys: means of all key blocks, (batch, blocks, kv_heads, head_dim).
        """
        size = self.block_size
        own, real = shard.all_blocks(size)[shard.comm.rank], shard.covered(size) // size
        if self.refine:
            for _, found in refined_maps(queries, keys, shard, scale, size, self.refine):
                chosen = heaviest_pairs(found.weights, self.gamma, real, shard.comm)
                yield found.lists(chosen & found.visible | found.always)
            return
        group = queries.shape[2] // keys.shape[2]
        width = max(1, _MAP // (queries.shape[0] * group * own.numel() * keys.shape[1]))  # kv heads at a time
        for first in range(0, keys.shape[2], width):
            kv, heads = slice(first, first + width), slice(first * group, (first + width) * group)
            yield pack_blocks(
                self._query_aware(queries[:, :, heads], keys[:, :, kv], own, real, scale, shard.comm)
            )

    def _query_aware(
        self, queries: Tensor, keys: Tensor, own: Tensor, real: int, scale: float, comm: Collective
    ) -> Tensor:
        """Blocks of some heads by pooled attention.

        Args:
            queries: means of this rank's query blocks ``own``, (batch, local blocks, q_heads, head_dim).
            keys: means of all key blocks, (batch, blocks, kv_heads, head_dim).
            real: blocks of the sequence that hold a real token.

        Returns:
            bool (batch, q_heads, local blocks, blocks).
        """
        block = torch.arange(keys.shape[1], device=keys.device)
        future = block > own[:, None]
        scores = grouped_products(queries, keys).mul_(scale).masked_fill_(future, -torch.inf)
        pooled = scores.softmax(-1)
        del scores
        pooled = pooled.masked_fill_((own >= real)[:, None], 0.0)  # rows of padding have no part in the map
        chosen = heaviest_pairs(pooled, self.gamma, real, comm) & ~future
        return chosen | (block == 0) | (block == own[:, None])

    def _vertical_slash(
        self, verticals: Tensor, slashes: Tensor, shard: SequenceShard
    ) -> tuple[Tensor, Tensor]:
        """Columns int32 (rows, capacity) and diagonals bool (rows, blocks) of the heads owned here."""
        seq_len = verticals.shape[1]
        token = torch.arange(seq_len, device=verticals.device)
        top_p = self.gamma if self.gamma < 1 else None
        nearest = token < self.block_size
        columns = shard.backend.heaviest(verticals, nearest, top_p, self.max_columns)
        distances = shard.backend.heaviest(slashes, nearest, top_p, seq_len)
        return columns.to(torch.int32), distances_to_diagonals(distances, seq_len, self.block_size)
