"""Evaluation while training on a GPU: the same training bit for bit, and no more memory than a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mtraining.train.loop as loop
from library_warnings import COMPILE
from mtraining.data import PrepareOptions, prepare
from mtraining.train.config import Config, parse_config
from mtraining.train.metrics import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings(*COMPILE, "ignore:.*deterministic:UserWarning"),
]
SEQ_LEN = 8192


def shards(folder: Path, start: int) -> Path:
    folder.mkdir()
    text = " ".join(str(number) for number in range(start, start + 12_000))
    (folder / "counting.txt").write_text(text, encoding="utf-8")
    prepare(PrepareOptions(sources=(str(folder),), out=folder / "shards", kind="text"), progress=False)
    return folder / "shards"


def config(output: Path, data: Path, evaluate: dict[str, Any] | None = None) -> Config:
    model = {
        "model_type": "qwen2", "vocab_size": 260, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3,
        "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return parse_config(
        {
            "output": str(output),
            "model": {"init": "random", "config": model},
            "data": {"path": str(data)},
            "pattern": {
                "name": "vertical_slash",
                "slash_by": "block",
                "refresh": {"every_n": 2},
                "coverage": 8,
            },
            "train": {"seq_len": SEQ_LEN, "steps": 4, "dtype": "bf16", "deterministic": True},
            "checkpoint": {"every": 0, "export": False, "async": False},
            "log": {"trackers": []},
            "evaluate": evaluate or {},
        }
    )


def test_training_is_the_same_and_evaluation_takes_no_more_than_a_step(tmp_path: Path) -> None:
    data, unseen = shards(tmp_path / "text", 0), shards(tmp_path / "unseen", 50_000)
    loop.train(config(tmp_path / "plain", data))
    evaluate = {"data": str(unseen), "every": 1, "attention": ["train", "dense"], "lengths": [1000, SEQ_LEN]}
    loop.train(config(tmp_path / "evaluated", data, evaluate))
    plain, records = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "evaluated")
    steps = [one for one in records if "loss" in one]
    assert [(one["loss"], one["grad_norm"]) for one in steps] == [
        (one["loss"], one["grad_norm"]) for one in plain
    ]
    evaluations = [one for one in records if "evaluation" in one]
    assert len(evaluations) == 5 and evaluations[-1]["held_out_loss"] < evaluations[0]["held_out_loss"]
    # Each has its own peak. From the second step on the optimizer has its state.
    assert max(one["memory"] for one in evaluations) <= min(one["memory"] for one in steps[1:])
