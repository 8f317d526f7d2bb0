"""Pooled attention on two levels: super-blocks of keys first, then the blocks of the best ones only.

A map of mean queries times mean keys has an entry for every pair of blocks, so it grows with the square of the length.
Here a row of blocks looks at means of super-blocks first. A super-block has about as many blocks as the square root of
their number. So a row of n blocks meets sqrt(n) means of super-blocks, and ``refine`` * sqrt(n) means of blocks in the
best ones. All rows together take n^1.5 products.

The super-blocks of a row's own block and of its document's first one are always among the best. Those between the two
lie in one document and in the past as a whole, so their plain means hold nothing of another document or of padding. The
query heads of one kv head choose super-blocks together, so that keys are gathered once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtraining.kernel import pack_blocks
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.blocks import grouped_products, products

_ENTRIES = 2**26  # numbers of gathered keys that are in memory at a time


def check_refine(pattern: Pattern, refine: int) -> None:
    """Refuse a number of super-blocks that leaves nothing to choose.

    Raises:
        UserError: naming ``pattern.refine``.
    """
    holds = refine == 0 or refine >= 3
    require(
        pattern,
        "refine",
        holds,
        "use 0 for all pairs, or 3 or more, as the first and the last are always among them",
    )


def super_block(blocks: int) -> int:
    """Blocks in a super-block of a sequence of ``blocks``: the power of two that is nearest to their square root."""
    return 1 << max(0, blocks - 1).bit_length() // 2


@dataclass(frozen=True)
class Refined:
    """The blocks that some heads look at, row by row, and their pooled attention.

    Attributes:
        blocks: int64 (batch, q_heads, rows, n), numbers of key blocks; some are beyond the last one.
        weights: (batch, q_heads, rows, n), fp32 or fp64: softmax over these blocks. 0 for those that the row may not
            attend, and in rows of padding.
        visible: bool, the same shape: some query of the row may attend to some key of the block.
        always: bool, the same shape: the row's own block, and the first one of its document.
        total: blocks of the sequence.
    """

    blocks: Tensor
    weights: Tensor
    visible: Tensor
    always: Tensor
    total: int

    def lists(self, chosen: Tensor) -> Tensor:
        """Chosen blocks, bool like ``weights``, packed: uint8 (batch, q_heads, rows, bytes)."""
        tiles = torch.zeros(*chosen.shape[:-1], self.total + 1, dtype=torch.bool, device=chosen.device)
        tiles.scatter_(-1, self.blocks.clamp(max=self.total), chosen)  # the last entry takes what is beyond
        return pack_blocks(tiles[..., : self.total])


def refined_maps(
    queries: Tensor, keys: Tensor, shard: SequenceShard, scale: float, block_size: int, refine: int
) -> Iterator[tuple[slice, Refined]]:
    """Pooled attention of this rank's rows of blocks, some query heads at a time: (query heads, what they look at).

    Args:
        queries: means of this rank's query blocks, (batch, rows, q_heads, head_dim)
            (:func:`mtraining.pattern.blocks.query_means`).
        keys: means of all key blocks, (batch, blocks, kv_heads, head_dim).
        refine: super-blocks that a row looks into, at least 3.
    """
    two_levels = _TwoLevels(queries, keys, shard, scale, block_size, refine)
    kv_heads, group = keys.shape[2], queries.shape[2] // keys.shape[2]
    a_head = keys.shape[0] * queries.shape[1] * two_levels.candidates * keys.shape[3]
    width = max(1, _ENTRIES // a_head)
    for first in range(0, kv_heads, width):
        kv = slice(first, min(first + width, kv_heads))
        yield slice(kv.start * group, kv.stop * group), two_levels.of_heads(kv)


class _TwoLevels:
    def __init__(
        self, queries: Tensor, keys: Tensor, shard: SequenceShard, scale: float, size: int, refine: int
    ) -> None:
        self.queries, self.keys, self.scale = queries, keys, scale
        blocks = keys.shape[1]
        self.width = super_block(shard.covered(size) // size)
        self.supers = -(-blocks // self.width)
        self.refine = min(refine, self.supers)
        self.candidates = self.refine * self.width
        padded = pad(keys, (0, 0, 0, 0, 0, self.supers * self.width - blocks))
        self.coarse = padded.unflatten(1, (self.supers, self.width)).mean(2)
        # Of each row: its block, the first one of its document, the first one it may attend; (batch or 1, rows).
        self.own = shard.all_blocks(size)[shard.comm.rank][None]
        self.first = self.nearest = torch.zeros_like(self.own)
        self.ends = torch.zeros_like(self.own, dtype=torch.bool)
        row = self.own[0] * size
        if shard.documents is not None:
            first = shard.documents.first
            self.first, self.nearest = first[:, row] // size, shard.documents.starts[:, row] // size
            # Keys of a block that its lead ends in are those of another document.
            self.ends = first[:, row] != first[:, row + size - 1]
        self.real = row < shard.length

    def of_heads(self, kv: slice) -> Refined:
        a_row = self.keys.shape[0] * (kv.stop - kv.start) * self.candidates * self.keys.shape[3]
        step = max(1, _ENTRIES // a_row)
        rows = [slice(at, at + step) for at in range(0, self.own.shape[1], step)]
        parts = zip(*(self._of_rows(kv, some) for some in rows), strict=True)
        blocks, weights, visible, always = (torch.cat(part, 2) for part in parts)
        return Refined(blocks, weights, visible, always, self.keys.shape[1])

    def _of_rows(self, kv: slice, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Blocks, weights, visible and always of :class:`Refined`, of some kv heads and rows."""
        keys = self.keys[:, :, kv].transpose(1, 2)  # (batch, kv, blocks, dim)
        batch, heads, total, dim = keys.shape
        group = self.queries.shape[2] // self.keys.shape[2]
        queries = self.queries[:, rows, kv.start * group : kv.stop * group]
        own, first, nearest, ends = (
            x[:, None, rows, None] for x in (self.own, self.first, self.nearest, self.ends)
        )
        best = self._best(queries, self.coarse[:, :, kv], own, first, nearest)
        inside = torch.arange(self.width, device=best.device)
        blocks = (best[..., None] * self.width + inside).flatten(3)  # (batch, kv, rows, candidates)
        visible = (blocks >= nearest) & (blocks <= own)
        weighed = visible & ~(ends & (blocks == own))
        places = blocks.clamp(max=total - 1).flatten(2)[..., None].expand(-1, -1, -1, dim)
        right = keys.gather(2, places).view(-1, self.candidates, dim)
        left = queries.unflatten(2, (heads, group)).transpose(1, 2).reshape(-1, group, dim)
        scores = products(left, right).mul_(self.scale).view(batch, heads, -1, group, self.candidates)
        hidden = ~weighed[:, :, :, None]
        weights = scores.masked_fill_(hidden, torch.finfo(scores.dtype).min).softmax(-1)
        weights = weights.masked_fill_(hidden | ~self.real[rows, None, None], 0.0)
        always = visible & ((blocks == own) | (blocks == first))
        blocks, visible, always = (x.repeat_interleave(group, 1) for x in (blocks, visible, always))
        return blocks, weights.transpose(2, 3).flatten(1, 2), visible, always

    def _best(self, queries: Tensor, coarse: Tensor, own: Tensor, first: Tensor, nearest: Tensor) -> Tensor:
        """Numbers of the super-blocks that each row looks into: int64 (batch, kv_heads, rows, refine).

        Args:
            queries: (batch, rows, q_heads, dim).
            coarse: means of super-blocks, (batch, super-blocks, kv_heads, dim).
            own, first, nearest: blocks, each (batch or 1, 1, rows, 1).
        """
        number = torch.arange(self.supers, device=queries.device)
        own, first, nearest = (x // self.width for x in (own, first, nearest))
        between = (number > first) & (number < own) & (number >= nearest)
        scores = grouped_products(queries, coarse).mul_(self.scale)
        scores = scores.masked_fill_(~between, torch.finfo(scores.dtype).min)
        votes = (scores.softmax(-1) * between).unflatten(1, (coarse.shape[2], -1)).sum(2)
        # All that is neither between nor one of these two is hidden from the row.
        return votes.masked_fill((number == own) | (number == first), torch.inf).topk(self.refine).indices
