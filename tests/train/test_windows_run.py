"""A run of a model with sliding windows: trained, evaluated meanwhile, resumed, exported, and asked beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import SEQ_LEN, evaluated, raw_config
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mtraining.cli import app
from mtraining.train import loop
from mtraining.train.config import parse_config
from mtraining.train.metrics import read_metrics

WINDOW = 40


def windowed_config(tmp_path: Path, shards: Path, unseen: Path, **sections: Any) -> dict[str, Any]:
    sections = {
        "log": {"every": 1, "recall_rows": 8}, "checkpoint": {"every": 2},
        "evaluate": {"data": str(unseen), "every": 2, "lengths": [64, SEQ_LEN], "bucket": 64},
        "pattern": {"refresh": {"every_n": 2}, "coverage": 8, "top_p": None, "top_k_columns": 8, "top_k_slashes": 10},
        **sections,
    }  # fmt: skip
    raw = raw_config(tmp_path / "run", shards, **sections)
    raw["model"]["config"] |= {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    raw["train"]["steps"] = 4
    return raw


@pytest.mark.slow
def test_a_run_with_windows(tmp_path: Path, shards: Path, unseen: Path) -> None:
    raw = windowed_config(tmp_path, shards, unseen)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")
    told = CliRunner().invoke(app, ["train", str(recipe), "--dry-run", "--memory-gib", "80"])
    assert told.exit_code == 0, told.output

    loop.train(parse_config(raw))
    records = read_metrics(tmp_path / "run")
    steps = [record for record in records if "loss" in record]
    for record in steps:
        full, window = record["layer_density"]
        assert window == 1.0 and record["density"] == full < 1 and 0 < record["recall"] < 1
    assert len(evaluated(records)) >= 2
    # The second half again, from its checkpoint, is the same to the bit.
    again = windowed_config(tmp_path, shards, unseen, checkpoint={"every": 2, "resume": "step_00000002"})
    loop.train(parse_config(again))
    resumed = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert [record["loss"] for record in resumed] == [record["loss"] for record in steps]

    folder = tmp_path / "exported"
    told = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(folder)])
    assert told.exit_code == 0, told.output
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.sliding_window == WINDOW
