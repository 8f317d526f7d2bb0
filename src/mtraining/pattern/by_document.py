"""Vertical-slash for packed documents: every document chooses its own columns and slashes, and no other's.

A diagonal shared by all rows would let one document choose for another. So each document has diagonals of its own, and
the index lists them as blocks. Columns need nothing of the kind: only their own document sees them.

Budgets are of what a document can attend:

* Slashes in token distances: as many as the pattern's budget, for each document. A query then reads no more of them
  than in a sequence of one document.
* Slashes in block diagonals: ``slash_density`` of each document's own tiles.
* Columns: the list has one length, and its keys and values are copied for every head. So documents share the budget
  by their length.
* The first tokens of a document are columns where its share holds them all. Else they are kept as tiles.
* A document too short for a probe query of its own is computed whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex, pack_blocks
from mtraining.pattern.base import SequenceShard
from mtraining.pattern.documents import (
    DiagonalSlots,
    Documents,
    Ranking,
    integer_masses,
    segment_totals,
)
from mtraining.pattern.probe import (
    column_and_slash_mass,
    document_probe,
    owned_rows,
    probe_scope,
    probed,
    share_choice,
)

if TYPE_CHECKING:
    from mtraining.pattern.vertical_slash import VerticalSlash

_TILES = 2**26  # tiles of a list that are looked at a time


class Budgets(NamedTuple):
    """What each row or head may keep; all (n, 1), on the device.

    Attributes:
        columns, sinks, distances, window: int64 tokens.
        density: fp64, share of the tiles.
        top_p: fp64, share of the mass; inf for fixed numbers.
    """

    columns: Tensor
    sinks: Tensor
    distances: Tensor
    window: Tensor
    density: Tensor
    top_p: Tensor


@lru_cache(maxsize=256)
def budgets(heads: tuple[VerticalSlash, ...], device: torch.device) -> Budgets:
    """Of some heads; kept, because a copy to the device would wait for it at every call."""

    def column(values: Sequence[float | None], dtype: torch.dtype) -> Tensor:
        return torch.tensor([torch.inf if x is None else x for x in values], dtype=dtype, device=device)[
            :, None
        ]

    return Budgets(
        column([head.column_budget() for head in heads], torch.int64),
        column([head.sinks for head in heads], torch.int64),
        column([head.distance_budget() for head in heads], torch.int64),
        column([head.window for head in heads], torch.int64),
        column([head.slash_density for head in heads], torch.float64),
        column([head.top_p for head in heads], torch.float64),
    )


@torch.no_grad()
def estimate_documents(
    q: Tensor, k: Tensor, shard: SequenceShard, scale: float, heads: tuple[VerticalSlash, ...]
) -> SparseIndex:
    """:func:`mtraining.pattern.vertical_slash.estimate_by_head` where the shard has documents.

    Args:
        heads: one pattern per query head, alike in ``block_size``, ``probe``, ``probe_at`` and ``slash_by``.
    """
    documents, one = shard.documents, heads[0]
    assert documents is not None
    batch, _, q_heads, _ = q.shape
    size, probe = one.block_size, min(one.probe, shard.length)
    at = document_probe(probe, one.probe_at, documents)
    scope = probe_scope(at, documents, one.slash_size)
    verticals, slashes = column_and_slash_mass(q, k, at, shard, scale, one.slash_size, scope=scope)

    number = owned_rows(verticals, batch, q_heads, shard)
    of_batch = number // q_heads
    mine = documents.of_rows(of_batch)
    places = DiagonalSlots.of(documents, size).of_rows(of_batch)
    given = Budgets(*(x[number % q_heads] for x in budgets(heads, q.device)))
    capacity = min(max(head.column_budget() for head in heads), shard.covered(size))
    columns = choose_columns(verticals, mine, given, probe, size, capacity)
    if one.slash_by == "token":
        diagonals = diagonals_of_distances(slashes, mine, places, given, probe, size)
    else:
        diagonals = choose_diagonals(slashes, places, given, probe, size)
    columns, diagonals = share_choice(columns, diagonals, batch, q_heads, shard)
    lists = tile_lists(diagonals, documents, budgets(heads, q.device), probe, shard, size)
    return shard.listed_index(size, lists, columns)


def choose_columns(
    mass: Tensor, documents: Documents, given: Budgets, probe: int, block_size: int, capacity: int
) -> Tensor:
    """Columns int64 (rows, capacity), ascending, padded with seq_len: of each document its heaviest.

    A document's columns stand at places of the list that depend on lengths alone. So how many another one chooses moves
    none, and changes no sum's order. Places left over are filled (:func:`column_filler`).

    Args:
        mass: of keys, (rows, seq_len).
        documents: of the rows.
        given: of the rows.
    """
    first, size = documents.first, documents.sizes
    share, reached = column_share(size, given.columns, documents.length), probed(documents, probe)
    place = torch.arange(documents.seq_len, device=mass.device)
    within = place - first
    fits = share >= torch.minimum(given.sinks, size)
    forced = reached & fits & (within < given.sinks)
    # Where the sinks are tiles, their keys need no column.
    mass = torch.where(fits | (place // block_size > sink_end(first, size, given.sinks, block_size)), mass, 0)
    ranking = Ranking(torch.where(forced, torch.inf, mass), first)
    units = integer_masses(mass, probe)
    goal = mass_goal(given.top_p, segment_totals(units, first, documents.past))
    wanted = (ranking.before(units).double() < goal) | (ranking.rank < given.sinks * fits)
    kept = ranking.chosen(wanted & reached & (ranking.rank < share))
    opens = reached & (within == 0)
    room = torch.where(opens, share, 0).cumsum(1)
    begin = room - share  # in the list, of the token's document
    filler = column_filler(documents)
    columns = torch.zeros(len(mass), capacity + 1, dtype=torch.int64, device=mass.device)
    columns.scatter_(1, torch.where(opens & (share > 0), begin, capacity), filler)
    used = torch.arange(capacity + 1, device=mass.device) < room[:, -1:]
    columns = torch.where(used, columns.cummax(1).values, documents.seq_len)
    number = kept.cumsum(1)
    number = number - number.gather(1, first) + kept.gather(1, first).long()  # from 1 on, in its document
    return columns.scatter_(1, torch.where(kept, begin + number - 1, capacity), place.expand_as(first))[
        :, :capacity
    ]


def column_filler(documents: Documents) -> Tensor:
    """What stands in a document's places of the list that hold no column: int64 (batch, seq_len).

    It is the document's last token: only its own query sees that, and the tile of the two holds it already. Nothing
    comes after the last document, so there it is seq_len, as behind every list.
    """
    return torch.where(documents.past >= documents.length, documents.seq_len, documents.past - 1)


def mass_goal(top_p: Tensor, total: Tensor) -> Tensor:
    """Mass at which enough is kept, fp64; inf where the numbers are fixed, whatever the total."""
    return torch.where(top_p.isinf(), torch.inf, top_p * total.double())


def column_share(size: Tensor, columns: Tensor, length: int) -> Tensor:
    """Columns of a document of ``size`` of the ``length`` tokens: int64, its share of ``columns``, rounded down."""
    return torch.minimum(columns * size // length, size)


def sink_end(first: Tensor, size: Tensor, sinks: Tensor, block_size: int) -> Tensor:
    """Last block that holds one of a document's first ``sinks`` tokens; the one before its first without any."""
    return (first + torch.minimum(sinks, size) - 1) // block_size


def diagonals_of_distances(
    mass: Tensor, documents: Documents, places: DiagonalSlots, given: Budgets, probe: int, block_size: int
) -> Tensor:
    """Block diagonals of each document that its heaviest token distances cross: bool (rows, slots).

    Args:
        mass: (rows, seq_len), that of distance d of a document at its token d.
    """
    first = documents.first
    distance = torch.arange(documents.seq_len, device=mass.device) - first
    forced = distance < given.window
    ranking = Ranking(torch.where(forced, torch.inf, mass), first)
    units = integer_masses(mass, probe)
    goal = mass_goal(given.top_p, segment_totals(units, first, documents.past))
    wanted = (ranking.before(units).double() < goal) | (ranking.rank < given.window)
    kept = ranking.chosen(wanted & (ranking.rank < given.distances))
    slots = places.first.shape[1]
    bits = torch.zeros(len(mass), slots + 1, dtype=torch.bool, device=mass.device)
    lower = distance // block_size
    for diagonal in (lower, lower + (distance % block_size > 0)):
        into = torch.where(kept & (diagonal < places.reach), places.base + diagonal, slots)
        bits.scatter_(1, into, True)
    return bits[:, :slots]


def choose_diagonals(
    mass: Tensor, places: DiagonalSlots, given: Budgets, probe: int, block_size: int
) -> Tensor:
    """Block diagonals of each document by mass, as many as fit its share of its own tiles: bool (rows, slots).

    See :func:`mtraining.pattern.diagonals.heaviest_diagonals`, which does it for one document.
    """
    offset, count = places.offsets, places.count
    there = offset < count
    # The farthest diagonal that the window crosses.
    forced = there & (offset <= -(-(given.window - 1) // block_size))
    weight = torch.where(forced, torch.inf, mass)
    ranking = Ranking(torch.where(there, weight, -1.0), places.first)
    tiles = torch.where(there, count - offset, 0)
    spent = ranking.before(tiles) + tiles.gather(1, ranking.order)
    wanted = spent.double() <= given.density * (count * (count + 1)).double() / 2
    units = integer_masses(torch.where(there, mass, 0), probe)
    total = segment_totals(units, places.first, (places.first + count).clamp(min=1))
    wanted &= ranking.before(units).double() < mass_goal(given.top_p, total)
    return (ranking.chosen(wanted) | forced) & there


def tile_lists(
    diagonals: Tensor, documents: Documents, given: Budgets, probe: int, shard: SequenceShard, block_size: int
) -> Tensor:
    """Tiles of this rank's query blocks, packed: uint8 (batch, q_heads, local blocks, bytes).

    Args:
        diagonals: bool (batch, q_heads, slots), of every head.
        given: of the heads.
    """
    own = shard.all_blocks(block_size)[shard.comm.rank]
    key = torch.arange(shard.seq_len // block_size, device=own.device)
    first, size = (x[:, own * block_size] for x in (documents.first, documents.sizes))  # (batch, rows)
    whole = probed(documents, probe)[:, own * block_size].logical_not() & (size > 0)
    begin = first // block_size
    inside = (key >= begin[..., None]) & (key <= own[:, None])
    distance = own[:, None] - key
    place = (2 * begin[..., None] + distance).clamp(min=0, max=diagonals.shape[2] - 1)
    # (heads, batch, rows): the last block that the sinks of a document take, where they are tiles.
    columns, sinks = given.columns[:, :, None], given.sinks[:, :, None]
    fits = column_share(size, columns, documents.length) >= torch.minimum(sinks, size)
    end = torch.where(fits, -1, sink_end(first, size, sinks, block_size)).transpose(0, 1)
    always = (key == own[:, None]) | (inside & whole[..., None])

    def of_heads(heads: slice) -> Tensor:
        bits = diagonals[:, heads, None].expand(-1, -1, own.numel(), -1)
        tiles = bits.gather(3, place[:, None].expand(-1, bits.shape[1], -1, -1))
        tiles |= key <= end[:, heads, :, None]
        return pack_blocks((tiles & inside[:, None]) | always[:, None])

    width = max(1, _TILES // max(1, inside.numel()))
    return torch.cat([of_heads(slice(h, h + width)) for h in range(0, diagonals.shape[1], width)], 1)
