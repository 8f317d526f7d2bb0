"""The comparison of training without an option and with it: what is run, kept, and taken from a folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mtraining.errors import UserError
from mtraining.train.config import Config


@pytest.fixture
def bench(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script; ``made``: configurations of the runs that were made. ``texts``: what was prepared."""
    parity: Any = script("option_parity")
    parity.made, parity.texts = [], []
    monkeypatch.setenv("MTRAINING_COMMIT", "abc")
    monkeypatch.setattr(parity, "make_data", lambda model, text, folder: parity.texts.append(text))

    def logged(config: Config) -> list[dict[str, Any]]:
        parity.made.append(config)
        loss = 2.0 if config.train.optimizer_state == "full" else 2.002
        return [{"step": 1, "loss": loss, "step_seconds": 0.5, "memory": 1e6}]

    monkeypatch.setattr(parity, "logged", logged)
    return parity


def words(tmp_path: Path, *more: str) -> list[str]:
    given = ["--text", "x", "--out", str(tmp_path / "out.csv"), "--model", "small", "--steps", "1"]
    return [*given, "--ranks", "1", "--set", "train.optimizer_state=8bit", *more]


def test_two_runs_differ_in_the_option_alone(bench: Any, tmp_path: Path) -> None:
    assert bench.main(words(tmp_path)) == 0
    without, with_ = (
        config.model_dump(exclude={"output": True, "train": {"optimizer_state"}}) for config in bench.made
    )
    assert without == with_
    assert [config.train.optimizer_state for config in bench.made] == ["full", "8bit"]
    assert len(bench.texts) == 1
    with (tmp_path / "out.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["loss_without"], row["loss_with"], row["relative"]) == ("2", "2.002", "0.001")


def test_runs_that_are_kept_are_not_made_again(bench: Any, tmp_path: Path) -> None:
    keep = ["--runs", str(tmp_path / "runs")]
    for which in ("with", "without"):
        assert bench.main(words(tmp_path, *keep, "--only", which)) == 0
    assert not (tmp_path / "out.csv").exists() and len(bench.made) == 2
    assert bench.main(words(tmp_path, *keep)) == 0
    assert len(bench.made) == 2 and (tmp_path / "out.csv").exists()
    assert len(bench.texts) == 2, "prepared for each of the two, and not for comparing them"


def test_what_was_ended_is_made_again(bench: Any, tmp_path: Path) -> None:
    left = tmp_path / "runs" / "without" / "metrics.jsonl"
    left.parent.mkdir(parents=True)
    left.write_text(json.dumps({"step": 1}))
    assert bench.main(words(tmp_path, "--runs", str(tmp_path / "runs"))) == 0
    assert not left.exists()


def test_bad_use_is_one_sentence(bench: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add --runs"):
        bench.main(words(tmp_path, "--only", "with"))
    keep = ["--runs", str(tmp_path / "runs")]
    assert bench.main(words(tmp_path, *keep)) == 0
    with pytest.raises(UserError, match="has a run without of other settings"):
        bench.main(words(tmp_path, *keep, "--both", "train.lr=1e-4"))
