"""Windows, shifted labels and layouts."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mtraining.data import SequenceDataset, TokenShards
from mtraining.errors import UserError
from mtraining.layout import build_layout

Make = Callable[..., TokenShards]


@pytest.fixture
def shards(make_shards: Make, counting: dict[str, str]) -> TokenShards:
    return make_shards(counting, shard_tokens=40)


def plain(shards: TokenShards, seq_len: int) -> list[list[int]]:
    """Documents-mode windows of seq_len + 1 tokens, written out."""
    windows = []
    for _, ids in shards.documents():
        start = 0
        while start + seq_len + 1 <= len(ids):
            windows.append(ids[start : start + seq_len + 1].tolist())
            start += seq_len
    return windows


@pytest.mark.parametrize("seq_len", [1, 3, 10, 16, 37, 64, 100])
def test_documents_mode(shards: TokenShards, seq_len: int) -> None:
    dataset = SequenceDataset(shards, seq_len)
    expected = plain(shards, seq_len)
    assert len(dataset) == len(expected)
    for window, tokens in enumerate(expected):
        item = dataset[window]
        assert {key: (value.dtype, value.shape) for key, value in item.items()} == dict.fromkeys(
            ("input_ids", "labels", "position_ids"), (torch.int64, torch.Size([seq_len]))
        )
        assert item["input_ids"].tolist() == tokens[:-1]
        assert item["labels"].tolist() == tokens[1:]
        assert item["position_ids"].tolist() == list(range(seq_len))


def test_report_counts_what_is_left_aside(shards: TokenShards) -> None:
    report = SequenceDataset(shards, 32).report
    # d37, d100 and d64 (38, 101 and 65 tokens) give 1 + 3 + 2 windows; d10 and d3 none
    assert (report.windows, report.documents_used, report.documents_too_short) == (6, 3, 2)
    assert (report.tokens_used, report.tokens_unused) == (6 * 32, 219 - 6 * 32)
    assert "2 documents too short" in report.render()


@pytest.mark.parametrize("mask", [False, True])
def test_concat_mode(shards: TokenShards, mask: bool) -> None:
    dataset = SequenceDataset(shards, 16, mode="concat", mask_boundaries=mask)
    stream = np.concatenate([ids for _, ids in shards.documents()]).astype(np.int64)
    assert len(dataset) == (len(stream) - 1) // 16
    inputs = torch.cat([dataset[window]["input_ids"] for window in range(len(dataset))]).numpy()
    labels = torch.cat([dataset[window]["labels"] for window in range(len(dataset))]).numpy()
    assert (inputs == stream[: len(inputs)]).all()
    crossing = inputs == 256
    assert crossing.sum() == 4
    assert (labels[~crossing] == stream[1 : len(labels) + 1][~crossing]).all()
    assert (labels[crossing] == (-100 if mask else stream[1 : len(labels) + 1][crossing])).all()


@pytest.mark.parametrize("mode", ["documents", "concat"])
@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_hold_the_plain_sequence(
    shards: TokenShards, mode: str, name: str, world: int
) -> None:
    layout = build_layout(name, unit=4)
    options: dict[str, Any] = {"mode": mode, "mask_boundaries": mode == "concat"}
    whole = SequenceDataset(shards, 32, **options)
    parts = [
        SequenceDataset(shards, 32, layout=layout, cp_rank=rank, cp_size=world, **options)
        for rank in range(world)
    ]
    for window in range(len(whole)):
        expected = whole[window]
        dealt = [part[window] for part in parts]
        for key, value in expected.items():
            assert all(item[key].shape == (32 // world,) for item in dealt)
            assert torch.equal(layout.unshard([item[key] for item in dealt], dim=0), value)
            for rank, item in enumerate(dealt):
                assert torch.equal(item[key], layout.shard(value, rank, world, dim=0))


def test_items_do_not_share_memory(shards: TokenShards) -> None:
    dataset = SequenceDataset(shards, 16)
    dataset[0]["position_ids"].zero_()
    assert dataset[1]["position_ids"].tolist() == list(range(16))


def test_order_is_a_permutation_by_seed_and_epoch(make_shards: Make) -> None:
    shards = make_shards({"long": "x" * 2000})
    dataset = SequenceDataset(shards, 16, seed=3)
    assert sorted(dataset.order(0).tolist()) == list(range(125))
    assert (dataset.order(0) == SequenceDataset(shards, 16, seed=3).order(0)).all()
    orders = {
        tuple(SequenceDataset(shards, 16, seed=seed).order(epoch)) for seed in (3, 4) for epoch in (0, 1)
    }
    assert len(orders) == 4
    # pinned: another library version must not reorder a resumed run
    assert dataset.order(0)[:6].tolist() == [20, 104, 28, 89, 74, 76]
    unshuffled = SequenceDataset(shards, 16, seed=None)
    assert unshuffled.order(7).tolist() == list(range(125))


def test_describe_names_document_and_tokens(shards: TokenShards) -> None:
    assert SequenceDataset(shards, 32).describe(2) == "document 'd100', tokens 32..64"
    assert SequenceDataset(shards, 32, mode="concat").describe(1) == "document 'd37', tokens 21..53"
    with pytest.raises(IndexError):
        SequenceDataset(shards, 32)[6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 101}, "the longest, 'd100', has 101; lower train.seq_len to at most 100"),
        ({"seq_len": 219, "mode": "concat"}, "has 219 tokens, .* lower train.seq_len to at most 218"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"seq_len": 8, "mode": "pakced"}, "mode 'pakced' is unknown; did you mean 'packed'"),
        ({"seq_len": 8, "mode": "packed", "look_ahead": 0}, "look_ahead is 0"),
        ({"seq_len": 8, "cp_size": 2}, "layout is missing"),
        ({"seq_len": 8, "cp_rank": 1}, "cp_rank is 1"),
        ({"seq_len": 9, "cp_size": 2, "layout": build_layout("zigzag")}, "seq_len"),
        (
            {"seq_len": 8, "vocab_size": 256},
            "document 'd10' holds token id 256, outside the model's vocabulary of 256",
        ),
    ],
)
def test_bad_input_is_refused(shards: TokenShards, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SequenceDataset(shards, **options)


def test_shortest_and_longest_lengths_that_fit(shards: TokenShards) -> None:
    assert len(SequenceDataset(shards, 100)) == 1
    assert len(SequenceDataset(shards, 218, mode="concat")) == 1
    assert len(SequenceDataset(shards, 8, vocab_size=257)) > 0


def test_ids_changed_after_the_check_are_still_caught(shards: TokenShards) -> None:
    dataset = SequenceDataset(shards, 32, vocab_size=300)
    file = shards.path / "tokens-00001.bin"
    ids = np.fromfile(file, dtype="<u2")
    ids[50] = 301  # token 46 of d100
    file.write_bytes(ids.tobytes())
    at_fault = [window for window in range(len(dataset)) if not _reads(dataset, window)]
    assert [dataset.describe(window) for window in at_fault] == ["document 'd100', tokens 32..64"]
    with pytest.raises(UserError, match=re.escape("document 'd100' holds token id 301")):
        dataset[at_fault[0]]


def _reads(dataset: SequenceDataset, window: int) -> bool:
    try:
        dataset[window]
    except UserError:
        return False
    return True
