"""FlexPrefill for packed documents: each document of each head is query-aware or vertical-slash.

The probe is as long as one block. Documents share it by their length, each with its last queries
(:func:`mtraining.pattern.probe.document_probe`). So no more documents can have a query than a block has tokens, and
that bounds every table here. A document without one is computed whole. The map of a document, its threshold and its
columns and distances (:mod:`mtraining.pattern.by_document`) are its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex, pack_blocks
from mtraining.pattern.base import SequenceShard
from mtraining.pattern.blocks import gathered, grouped_products, key_means, query_means
from mtraining.pattern.by_document import (
    Budgets,
    choose_columns,
    column_filler,
    diagonals_of_distances,
    tile_lists,
)
from mtraining.pattern.documents import DiagonalSlots, Documents
from mtraining.pattern.pooled import heaviest_pairs, jensen_shannon_distance
from mtraining.pattern.probe import (
    column_and_slash_mass,
    document_probe,
    gather_queries,
    owned_rows,
    probe_scope,
    share_choice,
    share_rows,
)
from mtraining.pattern.refined import refined_maps

if TYPE_CHECKING:
    from mtraining.pattern.flexprefill import FlexPrefill

_MAP = 2**24  # block pairs whose weights are in memory at a time


@dataclass(frozen=True)
class _Probed:
    """The documents that have probe queries, named by the first of these.

    Attributes:
        first: int64 (batch, probe), first token of the query's document.
        past: int64 (batch, probe), the token after its last.
        named: bool (batch, probe), the query is the first of its document.
        there: bool (batch, probe), there is such a query.
    """

    first: Tensor
    past: Tensor
    named: Tensor
    there: Tensor

    @classmethod
    def of(cls, at: Tensor, documents: Documents) -> _Probed:
        there = at >= 0
        first = torch.where(there, documents.first.gather(1, at.clamp(min=0)), -1)
        past = documents.past.gather(1, at.clamp(min=0))
        before = torch.nn.functional.pad(first[:, :-1], (1, 0), value=-1)
        return cls(first, past, there & (first != before), there)

    def which(self, first: Tensor) -> Tensor:
        """bool (..., probe): the document, by name, of tokens whose documents begin at ``first`` (batch, ...)."""
        shape = first.shape[0], *(1,) * (first.ndim - 1), -1
        return (first[..., None] == self.first.view(shape)) & self.named.view(shape)


@torch.no_grad()
def estimate_documents(
    pattern: FlexPrefill, q: Tensor, k: Tensor, shard: SequenceShard, scale: float
) -> SparseIndex:
    """:meth:`mtraining.pattern.flexprefill.FlexPrefill.estimate` where the shard has documents."""
    documents, size = shard.documents, pattern.block_size
    assert documents is not None
    batch, _, q_heads, _ = q.shape
    own = shard.all_blocks(size)[shard.comm.rank]
    at = document_probe(size, "last", documents)
    probed = _Probed.of(at, documents)
    probe = gather_queries(q, at, shard)
    scope = probe_scope(at, documents, 1)
    verticals, slashes = column_and_slash_mass(q, k, at, shard, scale, probe=probe, scope=scope)
    keys = gathered(key_means(k, size, shard), shard, size)
    # A document's last block may be led by it and end in another: its own keys there are those of the lead.
    last_keys = gathered(query_means(k, size, shard), shard, size)

    number = owned_rows(verticals, batch, q_heads, shard)
    of_batch = number // q_heads
    mine = documents.of_rows(of_batch)
    places = DiagonalSlots.of(documents, size).of_rows(of_batch)
    both = torch.cat(
        [
            (verticals * kept).unflatten(1, (-1, size)).sum(-1)
            for kept in (mine.in_tail(size), mine.in_lead(size))
        ],
        1,
    )
    true = share_rows(both, batch, q_heads, shard)[:, :, None].chunk(2, -1)  # tails, leads
    aware = _query_aware(pattern, probe, keys, last_keys, true, probed, scale)  # (batch, heads, probe)

    one = _budgets(pattern, shard.seq_len, q.device)
    given = Budgets(*(x.expand(len(number), 1) for x in one))
    capacity = min(pattern.max_columns, shard.covered(size))
    columns = choose_columns(verticals, mine, given, len(at[0]), size, capacity)
    diagonals = diagonals_of_distances(slashes, mine, places, given, len(at[0]), size)
    columns, diagonals = share_choice(columns, diagonals, batch, q_heads, shard)
    of_heads = Budgets(*(x.expand(q_heads, 1) for x in one))
    slash_lists = tile_lists(diagonals, documents, of_heads, len(at[0]), shard, size)

    which = probed.which(documents.first[:, own * size])  # (batch, rows, probe)
    aware_rows = (which[:, None] & aware[:, :, None]).any(-1)
    lists = torch.where(
        aware_rows[..., None], _pooled_lists(pattern, q, keys, which, probed, shard, scale), slash_lists
    )
    # Columns of documents whose head is query-aware are not wanted; their places stay.
    at = columns.flatten(1).clamp(max=shard.seq_len - 1).long()
    owner, filler = (x.gather(1, at).view_as(columns) for x in (documents.first, column_filler(documents)))
    dropped = (probed.which(owner) & aware[:, :, None]).any(-1) & (columns < shard.seq_len)
    columns = torch.where(dropped, filler, columns).int()
    return shard.listed_index(size, lists, columns)


def _query_aware(
    pattern: FlexPrefill, probe: Tensor, keys: Tensor, last_keys: Tensor, true: tuple[Tensor, ...],
    probed: _Probed, scale: float,
) -> Tensor:  # fmt: skip
    """Which documents, by name, pooling predicts well: bool (batch, q_heads, probe).

    Args:
        probe: (batch, probe, q_heads, head_dim).
        keys, last_keys: means of a block's tail and of its lead, (batch, blocks, kv_heads, head_dim).
        true: mass of a block's tail and of its lead, each (batch, q_heads, 1, blocks).
    """
    same = (probed.first[:, :, None] == probed.first[:, None]) & probed.there[:, None]
    count = same.sum(-1).clamp(min=1)
    mean = torch.einsum("bpq,bqhd->bphd", same.to(keys.dtype), probe.to(keys.dtype)) / count[..., None, None]
    block = torch.arange(keys.shape[1], device=keys.device)
    size = pattern.block_size
    begin, end = probed.first.clamp(min=0) // size, (probed.past - 1) // size
    last = (block == end[..., None])[:, None]
    inside = ((block >= begin[..., None]) & (block <= end[..., None]))[:, None]
    scores = torch.where(last, grouped_products(mean, last_keys), grouped_products(mean, keys)) * scale
    estimated = scores.masked_fill(~inside, -torch.inf).softmax(-1)
    held = torch.where(last, true[1], true[0]) * inside / count[:, None, :, None]
    return (jensen_shannon_distance(estimated, held) < pattern.tau) & probed.named[:, None]


def _pooled_lists(
    pattern: FlexPrefill, q: Tensor, keys: Tensor, which: Tensor, probed: _Probed, shard: SequenceShard,
    scale: float,
) -> Tensor:  # fmt: skip
    """Blocks by pooled attention, packed: uint8 (batch, q_heads, local blocks, bytes). Collective.

    Args:
        keys: means of tails, (batch, blocks, kv_heads, head_dim).
        which: the document of each of this rank's blocks, bool (batch, local blocks, probe).
    """
    documents, size = shard.documents, pattern.block_size
    assert documents is not None
    queries = query_means(q, size, shard)
    own = shard.all_blocks(size)[shard.comm.rank]
    block = torch.arange(keys.shape[1], device=keys.device)
    first, last_row = documents.first[:, own * size], documents.first[:, own * size + size - 1]
    visible = documents.visible(own, size)
    # Where a document ends inside the block, the block's tail is another's: its own tile is kept unweighed.
    weighed = visible & ~((first != last_row)[..., None] & (block == own[:, None]))
    always = visible & ((block == (first // size)[..., None]) | (block == own[:, None]))
    # Blocks whose first row is of the document: each row of the map sums to one.
    begin, end = -(-probed.first.clamp(min=0) // size), (probed.past - 1) // size
    total = (end - begin + 1).clamp(min=0)[:, None].double()
    if pattern.refine:
        return torch.cat(
            [
                maps.lists(
                    heaviest_pairs(maps.weights, pattern.gamma, total, shard.comm, which) & maps.visible
                    | maps.always
                )
                for _, maps in refined_maps(queries, keys, shard, scale, size, pattern.refine)
            ],
            1,
        )
    group = q.shape[2] // keys.shape[2]
    width = max(1, _MAP // (q.shape[0] * group * weighed[0].numel()))
    found = []
    for kv in range(0, keys.shape[2], width):
        heads = slice(kv * group, (kv + width) * group)
        scores = grouped_products(queries[:, :, heads], keys[:, :, kv : kv + width]).mul_(scale)
        scores = scores.masked_fill_(~weighed[:, None], torch.finfo(scores.dtype).min)
        pooled = scores.softmax(-1) * weighed[:, None]
        chosen = heaviest_pairs(pooled, pattern.gamma, total, shard.comm, which)
        found.append(pack_blocks((chosen & visible[:, None]) | always[:, None]))
    return torch.cat(found, 1)


@lru_cache(maxsize=64)
def _budgets(pattern: FlexPrefill, seq_len: int, device: torch.device) -> Budgets:
    """What a vertical-slash head may keep, (1, 1) each; made once, as a copy would wait for the device."""
    nearest = torch.tensor([[pattern.block_size]], device=device)
    top_p = pattern.gamma if pattern.gamma < 1 else torch.inf
    return Budgets(
        torch.tensor([[pattern.max_columns]], device=device),
        nearest,
        torch.tensor([[seq_len]], device=device),
        nearest,
        torch.tensor([[1.0]], dtype=torch.float64, device=device),
        torch.tensor([[top_p]], dtype=torch.float64, device=device),
    )
