"""Which key positions receive gradient, from queries at which distances, and how far indices move from step to step.

Both look at indices that are there anyway. Coverage looks at a sample of key positions: its cost and memory do not grow
with the sequence. A layer keeps 4 x q_heads x 512 bytes, 64 KiB for 32 heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex
from mtraining.kernel.starts import query_ends
from mtraining.pattern import SequenceShard

# Where each band of distances begins, in tokens; the last one has no end.
BAND_STARTS = (0, 1024, 4096, 32_768)
SAMPLED = 512
# Of a key position and a band: a query there reads the key; none does; no query is there. The larger one counts.
READ, UNREAD, ABSENT = 2, 1, 0
_TILES = 2**26  # tiles of lists that are looked at a time


# Drawing and copying them would hold up the host at every layer.
@lru_cache(maxsize=8)
def sampled_keys(seq_len: int, device: torch.device) -> Tensor:
    """The key positions that are looked at, the same in every step: int64 (min(seq_len, 512),), ascending."""
    order = torch.randperm(seq_len, generator=torch.Generator().manual_seed(0))
    return order[:SAMPLED].sort().values.to(device)


def key_coverage(index: SparseIndex, shard: SequenceShard) -> Tensor:
    """For sampled keys, whether a query in each band of distances reads them: uint8 (bands, q_heads, keys).

    Exact to the token. Of block lists, this rank's own rows are looked at; the maximum over ranks is that of all.

    Args:
        index: with the starts of its batch; sequences of a batch are joined.
    """
    device, size = index.diagonals.device, index.block_size
    keys = sampled_keys(index.seq_len, device)
    first, last = _query_ranges(index, shard, keys)
    exists = first <= last  # (bands, batch, keys)
    if index.blocks is None:
        prefix = torch.nn.functional.pad(index.diagonals.cumsum(-1, dtype=torch.int32), (1, 0))
        low = (first // size - keys // size).clamp(0, index.num_blocks)
        high = (last // size - keys // size + 1).clamp(0, index.num_blocks)
        heads = index.diagonals.shape[1]
        prefix = prefix.expand(len(BAND_STARTS), -1, -1, -1)
        below, upto = (prefix.gather(3, edge[:, :, None].expand(-1, -1, heads, -1)) for edge in (low, high))
        tile = upto > below
    else:
        tile = _by_tile(index, shard, keys, first, last)
    read = (_by_column(index, keys) | tile) & exists[:, :, None]
    found = torch.where(read.any(1), READ, torch.where(exists.any(1)[:, None], UNREAD, ABSENT))
    return found.to(torch.uint8)


def _query_ranges(index: SparseIndex, shard: SequenceShard, keys: Tensor) -> tuple[Tensor, Tensor]:
    """First and last query of each band that may attend to each sampled key: int64 (bands, batch, keys), empty where
    first is after last."""
    batch = index.diagonals.shape[0]
    if index.starts is None:
        ends = torch.full((batch, len(keys)), shard.length, device=keys.device)
    else:
        ends = query_ends(index.starts, keys).long().clamp(max=shard.length)
    first, last = _bands_of_keys(index.seq_len, keys.device, BAND_STARTS)
    return first.expand(-1, batch, -1), torch.minimum(last, ends - 1)


@lru_cache(maxsize=8)
def _bands_of_keys(seq_len: int, device: torch.device, starts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """First and last position of each band of each sampled key, also beyond the sequence: int64 (bands, 1, keys)."""
    keys = sampled_keys(seq_len, device)
    ends = (*starts[1:], seq_len)
    first = torch.stack([keys + begin for begin in starts])
    last = torch.stack([keys + max(begin, end) - 1 for begin, end in zip(starts, ends, strict=True)])
    return first[:, None], last[:, None]


def _by_column(index: SparseIndex, keys: Tensor) -> Tensor:
    """Whether each key is a column: bool (batch, q_heads, keys)."""
    columns = index.columns.contiguous()
    sought = keys.to(columns.dtype).expand(*columns.shape[:2], -1).contiguous()
    before, upto = (torch.searchsorted(columns, sought, right=right) for right in (False, True))
    return upto > before


def _by_tile(index: SparseIndex, shard: SequenceShard, keys: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Whether a tile of this rank's query blocks joins each key to each band: bool (bands, batch, q_heads, keys)."""
    own = shard.all_blocks(index.block_size)[shard.comm.rank]
    begin, end = own * index.block_size, (own + 1) * index.block_size - 1
    # (bands, batch, rows, keys): some query of the block is in the range
    meets = (begin[:, None] <= last[:, :, None]) & (end[:, None] >= first[:, :, None])
    parts = [
        torch.stack([(tiles & band[:, None]).any(2) for band in meets])
        for tiles in tiles_of_heads(index, own, keys // index.block_size)
    ]
    return torch.cat(parts, 2)


def tiles_of_heads(index: SparseIndex, q_blocks: Tensor, k_blocks: Tensor) -> Iterator[Tensor]:
    """What :meth:`SparseIndex.tile_mask` says of an index that lists blocks, as many heads at a time as memory allows:
    bool (batch, some heads, len(q_blocks), len(k_blocks))."""
    assert index.blocks is not None
    batch, heads, _ = index.diagonals.shape
    width = max(1, _TILES // (batch * len(q_blocks) * len(k_blocks)))
    for head in range(0, heads, width):
        some = slice(head, head + width)
        part = replace(index, diagonals=index.diagonals[:, some], blocks=index.blocks[:, some])
        yield part.tile_mask(q_blocks, k_blocks)


def unread_by_distance(by_layer: Mapping[int, Tensor]) -> list[float]:
    """Share of key positions that no query of a band reads, of those that have a query there: mean over layers.

    Returns:
        one share a band; 0 for a band that is beyond the sequence. Empty for no layer.
    """
    if not by_layer:
        return []
    shares = [
        (found == UNREAD).sum((1, 2)) / (found != ABSENT).sum((1, 2)).clamp(min=1)
        for found in by_layer.values()
    ]
    return [round(share, 6) for share in torch.stack(shares).mean(0).tolist()]


def overlap(index: SparseIndex, before: SparseIndex) -> Tensor:
    """How much of an index was in another one already: float64 (2, q_heads), shared and all scores of each head in the
    first sequence.

    A slash stands for the scores of its tiles, a column for those of all later queries. Scores that a column shares
    with a tile count in both. Block lists are left aside.
    """
    size, device = index.block_size, index.diagonals.device
    tiles = torch.arange(index.num_blocks, 0, -1, device=device).double() * size * size
    now, then = index.diagonals[0], before.diagonals[0]
    slashes = torch.stack([((now & then) * tiles).sum(-1), (now * tiles).sum(-1)])
    columns, earlier = index.columns[0].contiguous(), before.columns[0].contiguous()
    reach = (index.seq_len - columns.double()) * index.first_of_columns[0]
    there = torch.zeros_like(reach)
    if earlier.shape[1]:
        place = torch.searchsorted(earlier, columns).clamp(max=earlier.shape[1] - 1)
        there = reach * (earlier.gather(1, place) == columns)
    return slashes + torch.stack([there.sum(-1), reach.sum(-1)])
