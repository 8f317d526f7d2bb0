"""The benchmark of starts: its run is one that training takes, and each start is a row with every part."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from mtraining.train.checks import check_config
from mtraining.train.config import parse_config


@pytest.fixture
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("start_up")


@pytest.mark.parametrize(("device", "processes"), [("cpu", 1), ("cuda", 2)])
def test_its_run_can_be_trained(bench: ModuleType, tmp_path: Path, device: str, processes: int) -> None:
    bench.write_data(tmp_path / "data", 512)
    options = Namespace(shape="tiny", pattern="vertical_slash", seq_len=512, fused="none", device=device)
    raw = bench.recipe(options, tmp_path) | {
        "output": str(tmp_path / "run"),
        "parallel": {"cp": processes},
        "model": {"init": "random", "config": {"model_type": "qwen2", "vocab_size": bench.BYTES}},
    }
    found = check_config(parse_config(raw))
    assert found.dataset.counts(2)[0].sequences == 2


@pytest.mark.slow
@pytest.mark.sweep
def test_a_row_for_each_start(bench: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "starts.csv"
    sizes = ["--shape", "tiny", "--layers", "1", "--seq-len", "256", "--device", "cpu", "--processes", "1"]
    bench.main(["--out", str(out), *sizes])
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["processes"], row["caches"]) for row in rows] == [("1", "cold"), ("1", "warm")]
    for row in rows:
        parts = [float(row[part.replace(" ", "_")]) for part in bench.PARTS]
        assert sum(parts) == pytest.approx(float(row["start_seconds"]), abs=0.01 * len(parts))
        assert float(row["imports"]) > 0 and float(row["first_step"]) > 0
        # The command goes on after its first step, by a second one.
        assert float(row["start_seconds"]) < float(row["command_seconds"]) + 0.1
        assert row["kernels_compiled"] == "0"
