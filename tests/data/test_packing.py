"""Packed sequences: whole documents, exact labels, positions that restart, and the same batches for any split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtraining.data import SequenceDataset, TokenShards, build_loader, step_plan
from mtraining.data.packing import best_fit
from mtraining.data.shards import FORMAT_MASKED, META, trained_file
from mtraining.errors import UserError
from mtraining.layout import build_layout

Make = Callable[..., TokenShards]
SEQ_LEN = 32
LENGTHS = (5, 40, 1, 100, 33, 12, 12, 7, 31, 32, 64, 2, 9, 18, 3, 27)


@pytest.fixture
def shards(make_shards: Make) -> TokenShards:
    """Documents of LENGTHS bytes and the end-of-text token; no two begin alike, and neighbours differ."""
    texts = {
        f"d{place}": "".join(chr(33 + (31 * place + 7 * i) % 90) for i in range(length))
        for place, length in enumerate(LENGTHS)
    }
    return make_shards(texts, shard_tokens=90)


def packed(shards: Any, **options: Any) -> SequenceDataset:
    return SequenceDataset(shards, SEQ_LEN, **{"mode": "packed", "seed": 4, **options})


def alone(shards: TokenShards) -> Counter[tuple[int, ...]]:
    """Every piece of every document with its last label, written out: full windows, then the tail."""
    pieces: Counter[tuple[int, ...]] = Counter()
    for _, ids in shards.documents():
        for start in range(0, len(ids) - 1, SEQ_LEN):
            pieces[tuple(ids[start : start + SEQ_LEN + 1].tolist())] += 1
    return pieces


def pieces_of(item: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of each document of a sequence, by its starts; padding left out."""
    found = []
    for start in sorted(set(item["starts"].tolist())):
        here = item["starts"] == start
        assert here.nonzero()[0].item() == start  # a document begins where its starts say
        assert item["position_ids"][here].tolist() == list(range(int(here.sum())))
        inputs, labels = item["input_ids"][here].tolist(), item["labels"][here].tolist()
        if set(labels) != {-100}:
            found.append((inputs, labels))
        else:
            assert set(inputs) == {256} and int(here.nonzero()[-1]) == SEQ_LEN - 1
    return found


@pytest.mark.parametrize("look_ahead", [1, 3, 1000])
def test_every_piece_of_every_document_is_there_once_and_whole(shards: TokenShards, look_ahead: int) -> None:
    """Its own end-of-text token is its last label; no label is a token of another document."""
    dataset = packed(shards, look_ahead=look_ahead)
    found: Counter[tuple[int, ...]] = Counter()
    for window in range(len(dataset)):
        for inputs, labels in pieces_of(dataset[window]):
            assert inputs[1:] == labels[:-1]
            found[(*inputs, labels[-1])] += 1
    assert found == alone(shards)
    assert sum(piece[-1] == 256 for piece in found.elements()) == len(LENGTHS)


def test_types_and_starts(shards: TokenShards) -> None:
    item = packed(shards)[0]
    assert {key: (value.dtype, value.shape) for key, value in item.items()} == {
        "input_ids": (torch.int64, (SEQ_LEN,)),
        "labels": (torch.int64, (SEQ_LEN,)),
        "position_ids": (torch.int64, (SEQ_LEN,)),
        "starts": (torch.int32, (SEQ_LEN,)),
    }
    starts = item["starts"].long()
    assert (starts.diff() >= 0).all() and (starts <= torch.arange(SEQ_LEN)).all() and starts[0] == 0


def test_other_modes_have_no_starts(shards: TokenShards) -> None:
    for mode in ("documents", "concat"):
        assert "starts" not in packed(shards, mode=mode)[0]


def test_the_report_counts_padding(shards: TokenShards) -> None:
    dataset = packed(shards)
    items = [dataset[window] for window in range(len(dataset))]
    padding = sum(int((item["labels"] == -100).sum()) for item in items)
    report = dataset.report
    assert (report.windows, report.padding) == (len(items), padding)
    assert report.tokens_used == sum(LENGTHS) == len(items) * SEQ_LEN - padding
    assert report.documents_too_short == 0
    assert f"{padding / (len(items) * SEQ_LEN):.2%} padding" in report.render()
    assert dataset.padding(range(len(dataset))) == padding


def test_work_is_the_sum_of_squares_of_documents(shards: TokenShards) -> None:
    dataset = packed(shards)
    for window in range(len(dataset)):
        counts = torch.bincount(dataset[window]["starts"])
        assert dataset.work([window]) == float((counts.double() ** 2).sum())
    assert packed(shards, mode="documents").work([0]) is None


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_hold_the_packed_sequence(shards: TokenShards, name: str, world: int) -> None:
    layout = build_layout(name, unit=4)
    whole = packed(shards)
    parts = [packed(shards, layout=layout, cp_rank=rank, cp_size=world) for rank in range(world)]
    again = [whole.dealt(layout, rank, world) for rank in range(world)]
    for window in range(len(whole)):
        expected, dealt = whole[window], [part[window] for part in parts]
        for key in ("input_ids", "labels", "position_ids"):
            assert torch.equal(layout.unshard([item[key] for item in dealt], dim=0), expected[key])
        assert all(torch.equal(item["starts"], expected["starts"]) for item in dealt)
        for item, part in zip(dealt, again, strict=True):
            assert all(torch.equal(part[window][key], value) for key, value in item.items())


def test_packing_is_pinned_and_depends_on_the_seed(shards: TokenShards) -> None:
    """Another version of a library must not pack a resumed run otherwise."""
    dataset = packed(shards)
    assert [dataset.windows[0].pieces(window)[0].tolist() for window in (0, 11, 12)] == [
        [315],
        [184, 351, 38, 380],
        [210, 145, 182],
    ]
    described = {seed: [packed(shards, seed=seed).describe(i) for i in range(8)] for seed in (4, 5)}
    assert described[4] != described[5]
    stored = packed(shards, seed=None, look_ahead=1)
    assert stored.describe(0) == "document 'd0', tokens 0..5"


def test_a_new_order_each_epoch(shards: TokenShards) -> None:
    dataset = packed(shards)
    epochs = [[dataset.sample(n) for n in range(first, first + len(dataset))] for first in (0, len(dataset))]
    assert epochs[0] != epochs[1]
    assert all(sorted(epoch) == list(range(len(dataset))) for epoch in epochs)


def rows(loader: Any, key: str = "input_ids") -> list[list[tuple[int, ...]]]:
    return [[tuple(row) for row in batch[key].tolist()] for batch in loader]


@pytest.mark.parametrize(
    ("dp_size", "micro_batch", "workers"),
    [(1, 1, 0), (1, 2, 0), (2, None, 0), (2, 1, 0), (4, None, 0), (4, 1, 0), (8, 1, 0), (2, 2, 1)],
)
def test_any_split_gives_the_same_global_batches(
    shards: TokenShards, dp_size: int, micro_batch: int | None, workers: int
) -> None:
    """Which ranks read a sequence differs, by work; which sequences a step has does not."""
    dataset, steps = packed(shards), 3
    expected = [sorted(step) for step in rows(build_loader(dataset, global_batch=8, steps=steps))]
    ranks = [
        rows(
            build_loader(
                dataset, global_batch=8, dp_rank=rank, dp_size=dp_size, micro_batch=micro_batch, steps=steps,
                num_workers=workers,
            )
        )
        for rank in range(dp_size)
    ]  # fmt: skip
    pieces = len(ranks[0]) // steps
    for step in range(steps):
        these = slice(step * pieces, (step + 1) * pieces)
        assert sorted(row for rank in ranks for piece in rank[these] for row in piece) == expected[step]


def test_resume_at_any_step(shards: TokenShards) -> None:
    dataset = packed(shards)
    options: dict[str, Any] = {"global_batch": 4, "dp_size": 2, "dp_rank": 1, "steps": 6}
    whole = rows(build_loader(dataset, **options))
    for start in range(6):
        assert rows(build_loader(packed(shards), start_step=start, **options)) == whole[start:]


@pytest.mark.parametrize("micro_batch", [1, 2, None])
def test_ranks_that_wait_for_one_another_compute_alike(make_shards: Make, micro_batch: int | None) -> None:
    """Sequences of one, two, four, ... documents differ in work by up to 32 times; so would ranks, unsorted."""
    texts = {f"d{n}_{i}": "x" * (64 // n) for n in (1, 2, 4, 8, 16, 32) for i in range(8 * n)}
    dataset = SequenceDataset(make_shards(texts), 64, mode="packed", seed=1)
    assert len(dataset) == 48
    per_rank = 48 // 4
    for step in range(2):
        plan = step_plan(dataset, step, global_batch=48, dp_size=4, micro_batch=micro_batch)
        assert sorted(window for rank in plan.windows for window in rank) == list(range(48))
        assert [len(rank) for rank in plan.windows] == [per_rank] * 4
        work = np.array([dataset.work(rank) for rank in plan.windows])
        rounds = work.reshape(4, -1, micro_batch or per_rank).sum(2)
        assert plan.imbalance == pytest.approx(rounds.max(0).sum() / rounds.mean(0).sum())
        assert plan.imbalance == pytest.approx(1.0)
        order = np.array([dataset.sample(n) for n in range(step * 48, (step + 1) * 48)]).reshape(4, -1)
        plain = (
            np.array([dataset.work(rank) for rank in order]).reshape(4, -1, micro_batch or per_rank).sum(2)
        )
        assert plain.max(0).sum() / plain.mean(0).sum() > 1.1  # what consecutive parts would give


def test_one_replica_and_equal_sequences_have_no_imbalance(shards: TokenShards) -> None:
    assert step_plan(packed(shards), 0, global_batch=4).imbalance is None
    assert step_plan(packed(shards, mode="documents"), 0, global_batch=4, dp_size=2).imbalance is None


def test_tokens_that_are_not_trained_have_no_label(shards: TokenShards) -> None:
    """And pieces without a trained one, such as the first window of d3, take no room."""
    trained = np.arange(shards.num_tokens) % 3 > 0
    long = int(shards.starts[3])
    trained[long + 1 : long + 1 + SEQ_LEN] = False
    meta = json.loads((shards.path / META).read_text())
    first = 0
    for number, shard in enumerate(meta["shards"]):
        here = trained[first : first + shard["tokens"]]
        (shards.path / trained_file(number)).write_bytes(here.astype(np.uint8).tobytes())
        shard["trained"] = int(here.sum())
        first += shard["tokens"]
    (shards.path / META).write_text(json.dumps({**meta, "format": FORMAT_MASKED}))
    masked = packed(TokenShards(shards.path))
    left_out = []
    for start, length in zip(shards.starts.tolist(), LENGTHS, strict=True):
        pieces = [(start + at, min(SEQ_LEN, length - at)) for at in range(0, length, SEQ_LEN)]
        left_out += [(at, size) for at, size in pieces if not trained[at + 1 : at + size + 1].any()]
    assert (long, SEQ_LEN) in left_out
    assert masked.report.windows_untrained == len(left_out)
    assert masked.report.tokens_used == sum(LENGTHS) - sum(size for _, size in left_out)
    found: Counter[int] = Counter()
    for window in range(len(masked)):
        item = masked[window]
        for inputs, labels in pieces_of(item):
            assert all(label in (-100, after) for label, after in zip(labels, inputs[1:], strict=False))
            found.update(labels)
    stream = np.concatenate([ids for _, ids in shards.documents()])
    trained[shards.starts] = False  # a document's first token is nobody's label
    del found[-100]
    assert found == Counter(stream[trained].tolist())


def test_documents_of_one_token_have_nothing_to_learn(make_shards: Make) -> None:
    source = make_shards({"a": "x", "b": "yz"})
    report = packed(source).report
    assert (report.documents_used, report.documents_too_short) == (2, 0)
    source.lengths = np.array([1, 1])
    with pytest.raises(UserError, match="no document of two tokens"):
        packed(source)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(1, 70))
def test_best_fit_on_any_lengths(lengths: list[int], look_ahead: int) -> None:
    """Whole, once each, within capacity; and no sequence is closed while a piece that waits would fit."""
    order, ends = best_fit(np.array(lengths), 20, look_ahead)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    waiting, arrived, first = list(range(len(lengths)))[:look_ahead], min(look_ahead, len(lengths)), 0
    for end in ends.tolist():
        room = 20
        for piece in order[first:end].tolist():
            fitting = [p for p in waiting if lengths[p] <= room]
            assert piece == max(fitting, key=lambda p: (lengths[p], -p))
            waiting.remove(piece)
            room -= lengths[piece]
            if arrived < len(lengths):
                waiting.append(arrived)
                arrived += 1
        assert room >= 0 and not [p for p in waiting if lengths[p] <= room]
        first = end
    assert first == len(lengths)
