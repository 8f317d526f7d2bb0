"""XAttention (arXiv 2503.16428): blocks chosen by the sums of their antidiagonals.

Section 2.1 of the paper: in every stride x stride square of the score matrix the scores on the antidiagonal are summed.
So each token has a part in the sum, and every vertical and slash crosses the antidiagonal. With S the stride, square
(i, j) has the score

    a(i, j) = scale / S * sum over s < S of q[i S + s] . k[j S + S - 1 - s].

Section 2.2: a softmax over j of the causal squares (j <= i); block (I, J) has the sum over its squares; each
row of blocks keeps the fewest blocks whose sum reaches the threshold of the row's total. As in the authors'
code the first block and the query's own are always kept and count first.

Where documents are packed, a row of blocks scores its lead's queries against the keys of the same document
(:mod:`mtraining.pattern.documents`). In a block that a document ends in, its keys there are not scored. So the
threshold is then a share of the earlier blocks' mass.

Squares grow with the square of the length. With ``refine`` a row scores mean keys on two levels instead
(:mod:`mtraining.pattern.refined`), and keeps the fewest blocks that reach the threshold of these scores' softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex
from mtraining.kernel.reference.attention import accumulation_dtype
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.blocks import gathered, heaviest_blocks, key_means, products, query_means
from mtraining.pattern.refined import check_refine, refined_maps

_KEY_BLOCKS = 256  # key blocks of the whole sequence that travel at a time
_SCORES = 2**25  # scores that are in memory at a time


@dataclass(frozen=True)
class XAttention(Pattern):
    """Blocks by antidiagonal mass.

    The score of a square is one product of stride * head_dim numbers with all of its keys in it, so every rank must
    meet every key once. These are kv_heads * head_dim numbers a token, half of what one forward ring moves: 268 MB a
    layer for 512K tokens and 2 kv heads of 128 in bf16. They come in pieces of 256 blocks and are dropped after
    scoring; no rank holds all of them.

    What stays is 4 bytes for each row of squares and block of the sequence, for the query heads of one kv head at a
    time: 134 MB for 8 heads at 512K tokens over 32 ranks. Scores themselves are made and dropped 2^25 at a time
    (134 MB, and as much for their softmax). Where a whole piece of them lies in the future it is left out. Each rank
    chooses for its own queries.

    With ``refine`` only mean keys travel: 4 * kv_heads * head_dim bytes a block, 4 MB for these 512K tokens.

    Attributes:
        stride: side of the squares, a divisor of ``block_size``; the estimate multiplies 1 / stride of all scores.
        threshold: share of a row's estimated mass to keep; 1 keeps every block, with ``refine`` every one looked at.
        refine: super-blocks of keys that a row looks into, at least 3; each has about as many blocks as the square root
            of their number. 0 scores all pairs of squares, as the paper does.
    """

    stride: int = 16
    threshold: float = 0.9
    refine: int = 0

    name = "xattention"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.stride >= 1 and self.block_size % self.stride == 0
        require(self, "stride", fits, f"use a divisor of pattern.block_size={self.block_size}, such as 16")
        require(
            self, "threshold", 0 < self.threshold <= 1, "use a share of the mass between 0 and 1, such as 0.9"
        )
        check_refine(self, self.refine)

    @torch.no_grad()
    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        if self.refine:
            return self._refined(q, k, shard, scale)
        own = shard.all_blocks(self.block_size)[shard.comm.rank]
        key = torch.arange(shard.seq_len // self.block_size, device=q.device)
        first = torch.zeros_like(own)[None]
        if shard.documents is not None:
            first = shard.documents.first[:, own * self.block_size] // self.block_size
        forced = (key == first[..., None]) | (key == own[:, None])  # (batch or 1, rows, blocks)
        shape = q.shape[0], q.shape[2], *forced.shape[1:]
        chosen = torch.zeros(shape, dtype=torch.bool, device=q.device)
        for heads, rows, mass in block_mass(q, k, shard, scale, self.block_size, self.stride):
            seen = mass.shape[-1]  # no row of these sees more
            always = forced[:, None, rows, :seen]
            chosen[:, heads, rows, :seen] = heaviest_blocks(mass, always, self.threshold)
        return shard.block_index(self.block_size, chosen)

    def _refined(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        """:meth:`estimate` by mean keys on two levels."""
        size = self.block_size
        queries, keys = query_means(q, size, shard), gathered(key_means(k, size, shard), shard, size)
        lists = [
            found.lists(heaviest_blocks(found.weights, found.always, self.threshold))
            for _, found in refined_maps(queries, keys, shard, scale, size, self.refine)
        ]
        none = torch.empty(q.shape[0], q.shape[2], 0, dtype=torch.int32, device=q.device)
        return shard.listed_index(size, torch.cat(lists, 1), none)


def antidiagonal_mass(
    q: Tensor, k: Tensor, shard: SequenceShard, scale: float, block_size: int, stride: int
) -> Tensor:
    """Estimated mass of each block under this rank's queries: (batch, q_heads, local blocks, blocks), fp32 or fp64.

    A row sums to the block's rows of squares, block_size / stride. Collective over ``shard.comm``.
    """
    shape = q.shape[0], q.shape[2], q.shape[1] // block_size, shard.seq_len // block_size
    whole = q.new_zeros(shape, dtype=accumulation_dtype(q.dtype))
    for heads, rows, mass in block_mass(q, k, shard, scale, block_size, stride):
        whole[:, heads, rows, : mass.shape[-1]] = mass
    return whole


def block_mass(
    q: Tensor, k: Tensor, shard: SequenceShard, scale: float, block_size: int, stride: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """:func:`antidiagonal_mass` in parts that are small: (query heads, local blocks, mass of those).

    A part's last dimension ends where no row of it sees more. Collective over ``shard.comm``, part by part.
    """
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    for head in range(kv_heads):
        heads = slice(head * group, (head + 1) * group)
        scorer = _Scorer(q[:, :, heads], k[:, :, head], shard, scale, block_size, stride)
        for rows, mass in scorer.alone() if shard.comm.world == 1 else scorer.with_others():
            yield heads, rows, mass


class _Scorer:
    """The query heads of one kv head: q (batch, tokens, group, head_dim), k (batch, tokens, head_dim)."""

    def __init__(
        self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float, block_size: int, stride: int
    ) -> None:
        self.q, self.k, self.shard = shard.lead(q, block_size), shard.tail(k, block_size), shard
        self.factor, self.stride, self.size = scale / stride, stride, block_size
        self.squares = block_size // stride  # in a block, along either side
        self.blocks = q.shape[1] // block_size
        self.inside = torch.arange(self.squares, device=q.device)
        self.all_blocks = shard.all_blocks(block_size)
        self.rows = self._in_squares(self.all_blocks[shard.comm.rank])

    def alone(self) -> Iterator[tuple[slice, Tensor]]:
        """One process has all keys: rows in chunks, each with its past only."""
        keys = self._keys(self.k)
        for chunk in self._chunks(0, self.shard.seq_len // self.size):
            rows = self._of_squares(chunk)
            scores = self._scores(chunk, keys[:, : rows.stop])
            self._hide_future(scores[..., rows], rows, self.rows[rows])  # all before these is past
            self._hide_others(scores, rows, self.rows[: rows.stop])
            share = self._of_blocks(scores.softmax(-1), rows)
            mass = share.unflatten(-1, (-1, self.squares)).sum(-1)
            yield chunk, self._visible(mass, chunk, self.all_blocks[0])

    def with_others(self) -> Iterator[tuple[slice, Tensor]]:
        """Keys come in pieces: each row's softmax within a piece, weighted at the end by what the piece weighs."""
        comm, host = self.shard.comm, self.shard.host_blocks(self.size)
        width = max(1, _KEY_BLOCKS // comm.world)
        pieces = [slice(first, min(first + width, self.blocks)) for first in range(0, self.blocks, width)]
        numbers = [self.all_blocks[:, piece].flatten() for piece in pieces]
        shape = self.q.shape[0], self.q.shape[2], self.rows.numel()
        dtype = accumulation_dtype(self.q.dtype)
        weight = self.q.new_full((*shape, len(pieces)), -torch.inf, dtype=dtype)
        shares = self.q.new_zeros(*shape, self.shard.seq_len // self.size, dtype=dtype)
        of_piece = shares.split([blocks.numel() for blocks in numbers], -1)
        for place, (piece, blocks, share) in enumerate(zip(pieces, numbers, of_piece, strict=True)):
            mine = self.k[:, piece.start * self.size : piece.stop * self.size].contiguous()
            keys = self._keys(comm.all_gather(mine).transpose(0, 1).flatten(1, 2))
            # rows before the first see none of the piece
            first = int(torch.searchsorted(host[comm.rank].contiguous(), host[:, piece].min()))
            for chunk in self._chunks(first, blocks.numel()):
                rows = self._of_squares(chunk)
                scores = self._scores(chunk, keys)
                self._hide_future(scores, rows, self._in_squares(blocks))
                self._hide_others(scores, rows, self._in_squares(blocks))
                prob = scores.softmax(-1)
                # The largest score and its probability tell the log-sum-exp; that of a row that sees nothing is so
                # small that it weighs nothing.
                weight[:, :, rows, place] = scores.amax(-1) - prob.amax(-1).log()
                share[:, :, rows] = prob.unflatten(-1, (-1, self.squares)).sum(-1)
        weight = (weight - weight.logsumexp(-1, keepdim=True)).exp_()
        for place, share in enumerate(of_piece):
            share.mul_(weight[..., place, None])
        mass = self._of_blocks(shares, slice(0, self.rows.numel()))
        every = torch.arange(mass.shape[-1], device=mass.device)
        whole = slice(0, self.blocks)
        yield whole, self._visible(mass.index_select(-1, torch.cat(numbers).argsort()), whole, every)

    def _of_blocks(self, x: Tensor, rows: slice) -> Tensor:
        """Sums over the rows of squares ``rows`` of each block; a row without a query of the lead has no part."""
        token, documents = self.rows[rows] * self.stride, self.shard.documents
        if self.shard.padding:
            x = x * (token < self.shard.length)[:, None]
        if documents is not None:
            x = x * documents.in_lead(self.size)[:, None, token, None]
        return x.unflatten(2, (-1, self.squares)).sum(3)

    def _visible(self, mass: Tensor, rows: slice, blocks: Tensor) -> Tensor:
        """``mass`` (batch, group, rows, blocks) of the local blocks ``rows``, 0 where nothing may be attended.

        A row of squares that sees nothing has a softmax all the same.
        """
        if self.shard.documents is None:
            return mass
        own = self.all_blocks[self.shard.comm.rank][rows]
        return mass * self.shard.documents.visible(own, self.size)[:, None, :, blocks[: mass.shape[-1]]]

    def _chunks(self, first: int, key_blocks: int) -> Iterator[slice]:
        """Local blocks from ``first`` on, as many at a time as :data:`_SCORES` allows."""
        of_a_block = self.q.shape[0] * self.q.shape[2] * self.squares**2 * key_blocks
        step = max(1, _SCORES // of_a_block)
        for start in range(first, self.blocks, step):
            yield slice(start, min(start + step, self.blocks))

    def _keys(self, k: Tensor) -> Tensor:
        """(batch, tokens, head_dim) -> (batch, squares, stride * head_dim), each square's keys from last to first."""
        return k.unflatten(1, (-1, self.stride)).flip(2).flatten(2)

    def _scores(self, rows: slice, keys: Tensor) -> Tensor:
        """(batch, group, rows of squares, squares of keys)."""
        q = self.q[:, rows.start * self.size : rows.stop * self.size].unflatten(1, (-1, self.stride))
        batch, height, stride, group, dim = q.shape
        left = q.permute(0, 3, 1, 2, 4).reshape(batch, group * height, stride * dim)
        return products(left, keys).mul_(self.factor).view(batch, group, height, -1)

    def _hide_future(self, scores: Tensor, rows: slice, columns: Tensor) -> None:
        """Give squares of the future the least finite score (a row of -inf has no softmax), in place.

        Args:
            scores: (..., rows of squares, squares of keys).
            columns: int64, global numbers of the squares of keys.
        """
        scores.masked_fill_(columns > self.rows[rows, None], torch.finfo(scores.dtype).min)

    def _hide_others(self, scores: Tensor, rows: slice, columns: Tensor) -> None:
        """The same for squares without a key that their row may attend, as :meth:`_hide_future` takes them."""
        documents = self.shard.documents
        if documents is None:
            return
        token = self.rows[rows] * self.stride
        hidden = (columns + 1) * self.stride <= documents.starts[:, token, None]
        # Keys of a block that its lead ends in are those of another document.
        block, size = token // self.size, self.size
        ends = documents.first[:, block * size] != documents.first[:, block * size + size - 1]
        hidden |= ends[..., None] & (columns * self.stride // size == block[:, None])
        scores.masked_fill_(hidden[:, None], torch.finfo(scores.dtype).min)

    def _of_squares(self, blocks: slice) -> slice:
        return slice(blocks.start * self.squares, blocks.stop * self.squares)

    def _in_squares(self, blocks: Tensor) -> Tensor:
        """Numbers of the squares along some blocks: int64 (blocks,) -> (blocks * squares,)."""
        return (blocks[:, None] * self.squares + self.inside).flatten()
