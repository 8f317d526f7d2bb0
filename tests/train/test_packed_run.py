"""Runs on packed documents and on mixtures, beside a plain loop of transformers and torch alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import SEQ_LEN, raw_config, run_job
from torch import Tensor
from torch.nn.functional import cross_entropy

from distributed import ProcessPool
from mtraining.data import PrepareOptions, SequenceDataset, prepare, windows
from mtraining.errors import UserError
from mtraining.model import build_model
from mtraining.train import loop
from mtraining.train.checks import check_config
from mtraining.train.config import Config, parse_config
from mtraining.train.metrics import read_metrics
from mtraining.train.schedule import learning_rate


def make_source(folder: Path, name: str, lengths: tuple[int, ...]) -> Path:
    """Token shards of documents of so many bytes each."""
    text = folder / f"{name}-text"
    text.mkdir()
    for number, length in enumerate(lengths):
        words = " ".join(str((number + 3) * count) + name for count in range(length))
        (text / f"{number:02}.txt").write_text(words[:length], encoding="utf-8")
    prepare(PrepareOptions(sources=(str(text),), out=folder / name, kind="text"), progress=False)
    return folder / name


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 sequences of 256 tokens: long documents, and short ones that share."""
    lengths = (700, 31, 257, 90, 1, 310, 64, 12, 150, 255, 256, 40, 333, 99, 8, 77)
    return make_source(tmp_path_factory.mktemp("books"), "books", lengths)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("code"), "code", (900, 20, 130, 61, 61, 200))


def plain_loop(config: Config, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of transformers' own model under masks that are written out."""
    model, _ = build_model(config.model, SEQ_LEN)
    model.set_attn_implementation("sdpa")
    options = config.train
    optimizer = torch.optim.AdamW(model.parameters(), betas=options.betas, eps=options.eps, weight_decay=0.0)
    assert config.data.path is not None
    data = SequenceDataset(config.data.path, SEQ_LEN, mode="packed", seed=options.seed, look_ahead=8)
    seen = []
    for step in range(steps):
        places = range(step * options.batch_size, (step + 1) * options.batch_size)
        rows = [data[data.sample(place)] for place in places]
        ids, at, labels = (
            torch.stack([row[key] for row in rows]) for key in ("input_ids", "position_ids", "labels")
        )
        mask = torch.zeros(len(rows), 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool)
        for row in range(len(rows)):
            begins = [*(at[row] == 0).nonzero().flatten().tolist(), SEQ_LEN]
            for begin, end in pairwise(begins):
                for query in range(begin, end):
                    mask[row, 0, query, begin : query + 1] = True
        logits = model(ids, attention_mask=mask, position_ids=at, use_cache=False).logits
        total: Tensor = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = total / int((labels != -100).sum())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((loss.item(), norm.item()))
    return seen


@pytest.fixture(scope="module")
def plain(books: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    return plain_loop(packed_config(tmp_path_factory.mktemp("plain"), books), 5)


def packed_raw(output: Path, data: Path, **sections: Any) -> dict[str, Any]:
    train = {"steps": 5, "batch_size": 4, "micro_batch_size": 1, **sections.pop("train", {})}
    raw = raw_config(output, data, train=train, **sections)
    packed = {"path": str(data), "mode": "packed", "look_ahead": 8}
    return {**raw, "data": packed, "pattern": {"name": "dense", "block_size": 16}}


def packed_config(output: Path, data: Path, **sections: Any) -> Config:
    return parse_config(packed_raw(output, data, **sections))


@pytest.mark.parametrize(
    ("parallel", "micro"),
    [
        ({}, 4),
        pytest.param({"cp": 2}, 1, marks=pytest.mark.slow),
        pytest.param({"dp": 2, "cp": 2}, 1, marks=pytest.mark.slow),
    ],
    ids=["alone", "cp2", "dp2xcp2"],
)
def test_five_steps_of_a_plain_loop_with_block_diagonal_masks(
    pool: ProcessPool, tmp_path: Path, books: Path, plain: Any, parallel: dict[str, int], micro: int
) -> None:
    raw = packed_raw(tmp_path / "run", books, parallel=parallel, train={"micro_batch_size": micro})
    records = pool.run(run_job, world=parse_config(raw).parallel.world, raw=raw)[0]
    assert [record["loss"] for record in records] == pytest.approx([loss for loss, _ in plain], rel=2e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx([norm for _, norm in plain], rel=2e-4)
    assert plain[4][0] < plain[0][0] - 0.5  # five steps that do not move would show nothing
    data = SequenceDataset(books, SEQ_LEN, mode="packed", look_ahead=8)
    batches = [[data.sample(n) for n in range(step * 4, step * 4 + 4)] for step in range(5)]
    assert [record["padding"] for record in records] == [
        data.padding(batch) / (4 * SEQ_LEN) for batch in batches
    ]
    assert all(("replica_imbalance" in record) == (parallel.get("dp", 1) > 1) for record in records)
    if parallel.get("dp", 1) > 1:
        assert all(1 <= record["replica_imbalance"] < 2 for record in records)


def mixed_raw(output: Path, books: Path, code: Path, weight: float = 3.0, **sections: Any) -> dict[str, Any]:
    raw = packed_raw(output, books, **sections)
    sources = [{"path": str(code), "weight": 1.0, "max_epochs": 2}, {"path": str(books), "weight": weight}]
    return {**raw, "data": {"mode": "packed", "sources": sources}}


def test_a_mixture_is_told_and_resumes_bit_for_bit(
    tmp_path: Path, books: Path, code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = mixed_raw(tmp_path / "run", books, code, checkpoint={"every": 2, "keep_last": 9, "export": False})
    loop.train(parse_config(raw))
    told = capsys.readouterr().out
    assert "code: 6 sequences" in told and "books: " in told
    shares = "sequences of 5 steps by source: code 4 (20.0%, 0.67 epochs), books 16 (80.0%, 1.45 epochs)"
    assert told.count(shares) == 2  # as planned, and at the end
    records = read_metrics(tmp_path / "run")
    for record in records:
        counts = record["sequences/code"], record["sequences/books"]
        assert sum(counts) == record["step"] * 4
        assert abs(counts[0] - record["step"]) <= 1  # one of four
    losses = [record["loss"] for record in records]
    again = {**raw, "checkpoint": {**raw["checkpoint"], "resume": "step_00000002"}}
    loop.train(parse_config(again))
    assert [record["loss"] for record in read_metrics(tmp_path / "run")] == losses
    other = mixed_raw(tmp_path / "run", books, code, weight=2.0)
    with pytest.raises(
        UserError, match=r"data.sources: .*weight 3, .* -> .*weight 2, .*checkpoint.allow=\[data.sources\]"
    ):
        loop.train(parse_config({**other, "train": {**other["train"], "steps": 6}}))


def test_a_run_packs_each_source_once(
    tmp_path: Path, books: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[int] = []
    original = windows.best_fit
    monkeypatch.setattr(
        windows, "best_fit", lambda lengths, *rest: packed.append(len(lengths)) or original(lengths, *rest)
    )
    raw = mixed_raw(tmp_path / "run", books, code, checkpoint={"export": False})
    raw["train"] |= {"steps": 1, "warmup_steps": 0}
    loop.train(parse_config(raw))
    assert len(packed) == 2


def test_sources_that_end_before_the_run_are_refused_at_once(tmp_path: Path, books: Path, code: Path) -> None:
    raw = mixed_raw(tmp_path / "run", books, code)
    for source in raw["data"]["sources"]:
        source["max_epochs"] = 1
    with pytest.raises(
        UserError, match=r"all reach their max_epochs after \d+ sequences, and the run reads 20"
    ):
        check_config(parse_config(raw))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "data.path or data.sources says where the tokens are; give one of them"),
        ({"path": "a", "sources": [{"path": "b"}]}, "data.path or data.sources says .* give one"),
        ({"sources": [{"path": "x/a"}, {"path": "y/a"}]}, "two are named 'a'; give each a name of its own"),
        ({"sources": [{"path": "a", "weight": 0}]}, r"data.sources.0.weight=0 .* greater than 0"),
        ({"sources": [{"path": "a", "max_epochs": -1}]}, r"data.sources.0.max_epochs=-1 .* greater than 0"),
        (
            {"sources": [{"path": "a", "weigth": 2}]},
            r"data.sources.0.weigth .* did you mean data.sources.0.weight\?",
        ),
        ({"sources": [{"path": "a", "name": "a b"}]}, "data.sources.0.name"),
        ({"path": "a", "look_ahead": 9}, "data.look_ahead has no effect with mode=documents"),
        ({"path": "a", "mode": "pack"}, "data.mode='pack' .* is not valid"),
    ],
)
def test_bad_data_sections(tmp_path: Path, data: dict[str, Any], sentence: str) -> None:
    raw = raw_config(tmp_path / "run", tmp_path)
    with pytest.raises(UserError, match=sentence):
        parse_config({**raw, "data": data})


def test_one_source_is_the_same_run_by_either_option(tmp_path: Path, books: Path) -> None:
    """So that a run may go on when another way to name its folder is used."""
    raw = raw_config(tmp_path / "run", books, train={"steps": 1, "warmup_steps": 0})
    raw["data"]["mode"] = "concat"
    loop.train(parse_config(raw))
    raw["data"] = {"sources": [{"path": str(books), "name": "other"}], "mode": "concat"}
    raw["train"]["steps"] = 2
    loop.train(parse_config(raw))
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]
