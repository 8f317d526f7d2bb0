"""Packed documents: each chooses by itself, what a sequence of one document chooses stays, and nothing leaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from document_cases import CASES, NAMES, PACKED, SCALE, TOKENS, pattern_of
from mtraining.kernel import SparseIndex
from mtraining.pattern import SequenceShard, build_pattern
from mtraining.pattern.documents import DiagonalSlots, Documents, Ranking
from mtraining.pattern.probe import document_probe, probe_positions, probed
from pattern_cases import SIZE
from starts_cases import allowed, of_documents, of_window


def inputs(seed: int = 5, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(2, tokens, 4, 16, dtype=torch.float64, generator=made) * 2
    k = torch.randn(2, tokens, 2, 16, dtype=torch.float64, generator=made)
    k[:, ::11] *= 2
    return q, k


def shard_of(starts: Tensor | None, padding: int = 0) -> SequenceShard:
    tokens = TOKENS if starts is None else starts.shape[1]
    return SequenceShard.whole(tokens).of_batch(padding=padding, starts=starts)


def visible(index: SparseIndex, starts: Tensor) -> Tensor:
    """What is attended to: selected, and allowed by the starts."""
    return index.to_mask() & allowed(starts)


def test_no_pattern_is_left_out() -> None:
    from mtraining.pattern import PATTERNS

    assert {name for name, _ in CASES.values()} == set(PATTERNS)


@pytest.mark.parametrize("name", NAMES)
def test_one_document_chooses_what_a_sequence_does(name: str) -> None:
    q, k = inputs()
    plain = pattern_of(name).estimate(q, k, shard_of(None), SCALE).to_mask()
    one = pattern_of(name).estimate(q, k, shard_of(torch.zeros(2, TOKENS, dtype=torch.int32)), SCALE)
    assert torch.equal(one.to_mask(), plain)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_document_chooses_depends_on_no_other(name: str, packed: str) -> None:
    """Every document in turn is changed: nothing that another attends to may change, and its own must, somewhere."""
    starts, (q, k), (other_q, other_k) = PACKED[packed], inputs(), inputs(6)
    before = visible(pattern_of(name).estimate(q, k, shard_of(starts), SCALE), starts)
    assert before.diagonal(dim1=-2, dim2=-1).all(), "every token sees itself"
    moved = False
    for first in starts.unique().tolist():
        mine = (starts == first)[..., None, None]
        index = pattern_of(name).estimate(
            torch.where(mine, other_q, q), torch.where(mine, 30 * other_k, k), shard_of(starts), SCALE
        )
        differs = (visible(index, starts) != before).any(-1).any(1)
        assert not (differs & (starts != first)).any(), f"the document at {first} leaks"
        moved = moved or bool(differs.any())
    estimated = name not in ("a_shape", "dense", "toeplitz_random")
    assert moved or not estimated or packed == "tiny", "an index that never changes tests nothing"


BY_ROWS = ["a_shape", "moba", "xattention", "dense"]


@pytest.mark.parametrize("name", BY_ROWS)
def test_documents_at_blocks_choose_what_they_choose_alone(name: str) -> None:
    """Patterns without a probe: the index of a document is that of the document as a sequence."""
    starts, (q, k) = PACKED["at blocks"], inputs()
    mask = visible(pattern_of(name).estimate(q, k, shard_of(starts), SCALE), starts)
    for row, lengths in enumerate(([32, 8, 64, 24], [8, 8, 8, 104])):
        begin = 0
        for length in lengths:
            part = slice(begin, begin + length)
            alone = pattern_of(name).estimate(q[:, part], k[:, part], SequenceShard.whole(length), SCALE)
            wanted, got = alone.to_mask()[row], mask[row, :, part, part]
            if name == "a_shape":  # sinks are whole blocks where documents share a sequence
                assert (got >= wanted).all() and not (got & ~wanted)[..., SIZE:].any()
            else:
                assert torch.equal(got, wanted)
            begin += length


@pytest.mark.parametrize("name", NAMES)
def test_the_first_tokens_of_every_document_are_kept(name: str) -> None:
    sinks = {"moba": 0, "dense": 0, "toeplitz_random": 0, "xattention": SIZE, "flexprefill": SIZE, "union": 2}
    if "flexprefill" in name or name in sinks or name == "per_head":
        kept = SIZE if "flexprefill" in name else sinks.get(name, 0)
    else:
        kept = 3
    starts, (q, k) = PACKED["at blocks"], inputs()
    mask = visible(pattern_of(name).estimate(q, k, shard_of(starts), SCALE), starts)
    token = torch.arange(TOKENS)
    is_sink = (token - starts < kept)[:, None, None, :]
    assert mask[(allowed(starts) & is_sink).expand_as(mask)].all()


@pytest.mark.parametrize("packed", [*PACKED, "window"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name: str, packed: str) -> None:
    """Behind 128 tokens, any number of tokens without meaning: the same is chosen among the real ones."""
    starts = of_window(TOKENS, 21, 2) if packed == "window" else PACKED[packed]
    q, k = inputs()
    plain = visible(pattern_of(name).estimate(q, k, shard_of(starts), SCALE), starts)
    filler_q, filler_k = inputs(9, 40)
    more = torch.cat([starts, starts[:, -1:].expand(-1, 40)], 1)
    index = pattern_of(name).estimate(
        torch.cat([q, filler_q], 1), torch.cat([k, 40 * filler_k], 1), shard_of(more, padding=40), SCALE
    )
    assert torch.equal(visible(index, more)[..., :TOKENS, :TOKENS], plain)


def test_whose_token_is_whose() -> None:
    documents = Documents.of(of_documents([3, 5, 6, 2])[:, :16], 15)
    assert documents.first.tolist() == [[0] * 3 + [3] * 5 + [8] * 6 + [14, 15]]
    assert documents.past.tolist() == [[3] * 3 + [8] * 5 + [14] * 6 + [15, 16]]
    assert documents.sizes.tolist() == [[3] * 3 + [5] * 5 + [6] * 6 + [1, 0]]
    window = Documents.of(of_window(16, 4), 16)
    assert window.first.tolist() == [[0] * 16] and window.past.tolist() == [[16] * 16]


@pytest.mark.parametrize("packed", PACKED)
def test_places_of_diagonals_never_overlap(packed: str) -> None:
    documents = Documents.of(PACKED[packed], TOKENS)
    slots = DiagonalSlots.of(documents, SIZE)
    for row in range(2):
        taken: list[int] = []
        for first in documents.first[row].unique().tolist():
            base, reach = int(slots.base[row, first]), int(slots.reach[row, first])
            past = int(documents.past[row, first])
            blocks = (past - 1) // SIZE - first // SIZE + 1
            assert reach == (blocks if blocks > 1 else 0)
            taken += range(base, base + reach)
            assert slots.first[row, base : base + reach].tolist() == [base] * reach
            assert slots.count[row, base : base + reach].tolist() == [reach] * reach
        assert len(set(taken)) == len(taken) and all(place < 2 * TOKENS // SIZE for place in taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranking_sorts_each_segment(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 3, torch.inf, 3, 0, -1, 2, 0, torch.inf]], dtype=dtype)
    first = torch.tensor([[0, 0, 0, 0, 4, 4, 6, 6, 6]])
    ranking = Ranking(weight, first)
    assert ranking.order.tolist() == [[2, 1, 3, 0, 4, 5, 8, 6, 7]]
    assert ranking.rank.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    values = torch.arange(9)[None]
    assert ranking.before(values).tolist() == [[0, 2, 3, 6, 0, 4, 0, 8, 14]]


@pytest.mark.parametrize("placement", ["last", "spread", "mixed"])
def test_every_long_document_has_its_share_of_the_probe(placement: str) -> None:
    lengths = [300, 20, 100, 7, 85]
    documents = Documents.of(of_documents(lengths), 512)
    at = document_probe(64, placement, documents)[0]
    assert (at.diff() > 0).all()
    begin = 0
    for length in lengths:
        inside = (at >= begin) & (at < begin + length)
        if length * 64 >= 512:
            assert abs(int(inside.sum()) - 64 * length / (512 - 7)) < 1
            own = probe_positions(int(inside.sum()), placement, length, torch.device("cpu"))
            assert (at[inside] - begin).tolist() == own.tolist()
        else:
            assert not inside.any()
        assert bool(probed(documents, 64)[0, begin]) == (length * 64 >= 512)
        begin += length


def test_a_probe_of_tiny_documents_asks_nothing_twice() -> None:
    for lengths in ([2] + [1] * 98, [1] * 100):
        documents = Documents.of(of_documents(lengths), 100)
        at = document_probe(64, "spread", documents)[0]
        there = at[at >= 0].tolist()
        assert there == ([0, 1] if lengths[0] == 2 else [])


LEAST = {"block_size": SIZE, "top_p": 0.01, "window": 1, "probe_at": "spread"}


def test_short_documents_are_computed_whole() -> None:
    """They cost less than one probe-th of the sequence's full attention, whatever there is of them."""
    lengths = [60, 29, 31, 8]
    starts, (q, k) = of_documents(lengths, lengths), inputs()
    pattern = build_pattern("vertical_slash", **LEAST, probe=4, sinks=0)
    mask = visible(pattern.estimate(q, k, shard_of(starts), SCALE), starts)
    short = torch.tensor([size < TOKENS / 4 for size in lengths for _ in range(size)])
    everything = allowed(starts).expand_as(mask)
    assert torch.equal(mask[:, :, short], everything[:, :, short])
    assert mask[:, :, ~short].sum() < everything[:, :, ~short].sum() / 2
    assert everything[0, 0, short].sum() <= TOKENS**2 / 2 / 4


@pytest.mark.parametrize(("columns", "kept"), [(5, "tiles"), (6, "columns")])
def test_sinks_are_tiles_where_a_document_has_too_few_columns(columns: int, kept: str) -> None:
    """Half of 5 columns is 2, and there are 3 sinks."""
    starts, (q, k) = of_documents([64, 64], [64, 64]), inputs()
    pattern = build_pattern("vertical_slash", **LEAST, probe=16, sinks=3, max_columns=columns)
    index = pattern.estimate(q, k, shard_of(starts), SCALE)
    mask, token = index.to_mask(), torch.arange(TOKENS)
    sinks = (token % 64 < 3) & allowed(starts)
    assert mask[sinks.expand_as(mask)].all()
    rest = (token % 64 >= 3) & (token % 64 < SIZE) & allowed(starts) & (token[:, None] % 64 >= 2 * SIZE)
    assert bool(mask[rest.expand_as(mask)].all()) == (kept == "tiles")
    wanted = [] if kept == "tiles" else [0, 1, 2, 64, 65, 66]
    assert index.columns[index.columns < TOKENS].unique().tolist()[:6] == wanted or kept == "tiles"


def test_columns_stay_within_the_budget() -> None:
    for name in ("top_p", "top_k", "spread"):
        pattern = pattern_of(name)
        for packed in PACKED.values():
            index = pattern.estimate(*inputs(), shard_of(packed), SCALE)
            assert index.columns.shape[-1] == min(pattern.column_budget(), TOKENS)  # type: ignore[attr-defined]
            used = index.columns < TOKENS
            assert (index.columns[~used] == TOKENS).all()
            # What comes again is the last token of a document, which no other query sees.
            again = (index.columns.diff(dim=-1) == 0) & used[..., 1:]
            last = torch.nn.functional.pad(packed.diff(dim=-1) > 0, (0, 1), value=True)
            for row in range(2):
                assert last[row][index.columns[row][..., 1:][again[row]].long()].all()


def test_block_diagonals_stay_within_each_documents_share() -> None:
    """In tiles of the document, the window's forced ones aside; a share of the sequence would let one take all."""
    starts, (q, k) = of_documents([64, 64], [96, 32]), inputs()
    pattern = build_pattern(
        "vertical_slash", block_size=SIZE, top_p=None, top_k_columns=0, sinks=0, window=1, slash_by="block",
        slash_density=0.5, probe=16, probe_at="spread",
    )  # fmt: skip
    index = pattern.estimate(q, k, shard_of(starts), SCALE)
    tiles = {(b, h): t for b, h, t in index.tiles_by_head()}
    for row, lengths in enumerate(([64, 64], [96, 32])):
        for head in range(4):
            begin = 0
            for n in (length // SIZE for length in lengths):
                spent = int(tiles[row, head][begin : begin + n, begin : begin + n].sum())
                assert spent <= 0.5 * n * (n + 1) / 2
                assert spent > 0.5 * n * (n + 1) / 2 - n  # the next diagonal would not fit
                begin += n


def test_block_diagonals_under_a_window_are_a_share_of_what_it_leaves() -> None:
    """A share of all causal tiles would be more than the window has."""
    starts, (q, k) = of_window(TOKENS, 33, 2), inputs()
    pattern = build_pattern(
        "vertical_slash", block_size=SIZE, top_p=None, top_k_columns=0, sinks=0, window=1, slash_by="block",
        slash_density=0.5, probe=16, probe_at="spread",
    )  # fmt: skip
    shard = SequenceShard.whole(TOKENS).of_batch(starts=starts, packed=False)
    index = pattern.estimate(q, k, shard, SCALE)
    assert index.blocks is None, "one document keeps its diagonals"
    left = (allowed(starts)[0, 0].unflatten(1, (-1, SIZE)).unflatten(0, (-1, SIZE)).any(-1).any(1)).sum()
    for *_, tiles in replace(index, starts=starts).tiles_by_head():
        assert 0.5 * left - TOKENS // SIZE < tiles.sum() <= 0.5 * left


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", NAMES)
def test_columns_of_a_document_keep_their_places(name: str, packed: str) -> None:
    """Whatever others choose: else the order of its sums, and so their last bits, would depend on them."""
    starts, (q, k), (other_q, other_k) = PACKED[packed], inputs(), inputs(6)
    before = pattern_of(name).estimate(q, k, shard_of(starts), SCALE).columns
    assert (before.diff(dim=-1) >= 0).all()
    for first in starts.unique().tolist():
        mine = (starts == first)[..., None, None]
        changed = torch.where(mine, other_q, q), torch.where(mine, 9 * other_k, k)
        after = pattern_of(name).estimate(*changed, shard_of(starts), SCALE).columns
        for row in range(2):
            own = starts[row][before[row].clamp(max=TOKENS - 1).long()] == first
            own = own & (before[row] < TOKENS)
            later = starts[row][after[row].clamp(max=TOKENS - 1).long()] == first
            later = later & (after[row] < TOKENS)
            others = ~own & ~later
            assert torch.equal(before[row][others], after[row][others])
            assert not (own & ~later & (after[row] < TOKENS)).any()
