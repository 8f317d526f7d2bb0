"""Coverage of keys by distance and stability of indices, against masks written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtraining.kernel import SparseIndex
from mtraining.kernel.index import pack_blocks
from mtraining.model import key_coverage as room
from mtraining.model.key_coverage import ABSENT, READ, UNREAD, key_coverage, overlap, unread_by_distance
from mtraining.pattern import SequenceShard

TOKENS, BLOCK, HEADS = 64, 8, 3
BANDS = (0, 5, 20, 40)


@pytest.fixture(autouse=True)
def short_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BAND_STARTS", BANDS)


def shard_of(starts: Tensor | None = None) -> SequenceShard:
    return SequenceShard.whole(TOKENS).of_batch(starts=starts)


def random_index(seed: int, listed: bool = False, batch: int = 2, rate: float = 0.25) -> SparseIndex:
    generator = torch.Generator().manual_seed(seed)
    blocks = TOKENS // BLOCK
    diagonals = torch.rand(batch, HEADS, blocks, generator=generator) < rate
    columns = (
        torch.randint(TOKENS + 1, (batch, HEADS, 4), generator=generator, dtype=torch.int32).sort(-1).values
    )
    packed = None
    if listed:
        packed = pack_blocks(torch.rand(batch, HEADS, blocks, blocks, generator=generator) < rate)
    return SparseIndex(TOKENS, BLOCK, diagonals, columns, packed)


def documents(batch: int) -> Tensor:
    """Starts of two documents in each sequence, cut at another place."""
    starts = torch.zeros(batch, TOKENS, dtype=torch.int32)
    for row in range(batch):
        starts[row, 19 + 13 * row :] = 19 + 13 * row
    return starts


def mask_of(index: SparseIndex) -> Tensor:
    """Every (query, key) that is computed: bool (batch, heads, tokens, tokens)."""
    every = torch.arange(TOKENS // BLOCK)
    mask = index.tile_mask(every, every).repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
    for batch in range(mask.shape[0]):
        for head in range(HEADS):
            columns = index.columns[batch, head]
            mask[batch, head][:, columns[columns < TOKENS].long()] = True
    query, key = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    allowed = key <= query
    if index.starts is not None:
        allowed = allowed & (key >= index.starts[:, None, :, None])
    return mask & allowed


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_coverage_is_what_the_written_out_mask_says(listed: bool, packed: bool, seed: int) -> None:
    index = random_index(seed, listed)
    starts = documents(2) if packed else None
    index = replace(index, starts=starts)
    found = key_coverage(index, shard_of(starts))
    mask = mask_of(index)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    lowest = torch.zeros(2, 1, TOKENS, 1) if starts is None else starts[:, None, :, None]
    exists = (torch.arange(TOKENS) >= lowest).expand(2, 1, TOKENS, TOKENS)
    for place, (begin, end) in enumerate(zip(BANDS, (*BANDS[1:], TOKENS), strict=True)):
        band = (distance >= begin) & (distance < end)
        read = (mask & band).any(2).any(0)
        there = (exists & band).any(2).any(0).expand(HEADS, -1)
        expected = torch.where(read, READ, torch.where(there, UNREAD, ABSENT))
        assert torch.equal(found[place].long(), expected), place
    assert {READ, UNREAD, ABSENT} <= set(found.unique().tolist())


def test_shares_are_of_keys_that_have_a_query_there() -> None:
    layer = torch.tensor([[[READ, UNREAD, ABSENT, UNREAD]], [[ABSENT] * 4]], dtype=torch.uint8)
    full = torch.full_like(layer, READ)
    assert unread_by_distance({0: layer, 1: full}) == pytest.approx([1 / 3, 0])
    assert unread_by_distance({}) == []


@pytest.mark.parametrize("seed", range(3))
def test_overlap_counts_scores(seed: int) -> None:
    now, then = random_index(seed, batch=1), random_index(seed + 10, batch=1)
    shared = total = 0
    blocks = TOKENS // BLOCK
    for head in range(HEADS):
        for distance in range(blocks):
            scores = (blocks - distance) * BLOCK * BLOCK
            total += scores * bool(now.diagonals[0, head, distance])
            shared += scores * bool(now.diagonals[0, head, distance] and then.diagonals[0, head, distance])
        mine, other = (set(one.columns[0, head].tolist()) - {TOKENS} for one in (now, then))
        total += sum(TOKENS - column for column in mine)
        shared += sum(TOKENS - column for column in mine & other)
    assert overlap(now, then).tolist() == [shared, total]
    assert overlap(now, now)[0] == overlap(now, now)[1]
