"""The comparison of one process's losses with many's: what it runs, what it writes, and what it calls wrong.

The runs themselves are launched by hand (`benchmarks/loss_parity.py --seq-len 512 --steps 3`, two minutes on a CPU).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from mtraining.bench.processes import share_gpus
from mtraining.errors import UserError
from mtraining.train.config import Config


@pytest.fixture
def bench(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loss_parity = script("loss_parity")
    monkeypatch.setenv("MTRAINING_COMMIT", "abc")
    monkeypatch.setattr(loss_parity, "prepare_text", lambda text, folder: folder / "data")
    return loss_parity


def run(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    many: list[float],
    one: tuple[float, ...] = (4.0, 2.0),
) -> tuple[int, list[Config], list[dict[str, str]]]:
    """Exit status, the configurations launched, and the rows, of runs that log the given losses."""
    configs: list[Config] = []

    def launch(config: Config, nproc: int, before: object) -> None:
        assert nproc == config.parallel.cp and before is share_gpus
        configs.append(config)
        config.output.mkdir(parents=True)
        records = [
            {"step": step, "loss": loss, "density": 0.5, "step_seconds": 1.0}
            for step, loss in enumerate(one if nproc == 1 else many, 1)
        ]
        (config.output / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")

    monkeypatch.setattr(bench, "launch", launch)
    out = tmp_path / "parity.csv"
    status = bench.main(["--text", "x", "--out", str(out), "--steps", "2", "--ranks", "3"])
    return status, configs, list(csv.DictReader(out.read_text().splitlines()))


def test_both_runs_differ_in_their_processes_alone(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    status, configs, rows = run(bench, monkeypatch, tmp_path, [4.0, 2.001])
    assert status == 0
    one, many = (
        config.model_dump(exclude={"output": True, "parallel": {"cp"}, "data": {"path"}})
        for config in configs
    )
    assert one == many
    assert [config.parallel.world for config in configs] == [1, 3]
    assert configs[0].data.path == configs[1].data.path
    assert configs[0].output != configs[1].output
    rope = configs[1].model.rope
    assert (rope.type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 8192)
    assert (configs[1].layout.name, configs[1].train.dtype) == ("striped", "bf16")
    assert (configs[1].pattern.name, configs[1].pattern.refresh) == ("vertical_slash", "every_step")
    assert [(row["step"], row["loss_one"], row["loss_many"], row["relative"]) for row in rows] == [
        ("1", "4", "4", "0"),
        ("2", "2", "2.001", "0.0005"),
    ]
    assert {(row["commit"], row["ranks"], row["seq_len"], row["model"]) for row in rows} == {
        ("abc", "3", "32768", "SmolLM2-135M")
    }


@pytest.mark.parametrize("wrong", [2.0021, 1.9979, float("nan")])
def test_a_loss_that_is_off_fails_and_is_written(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: float
) -> None:
    status, _, rows = run(bench, monkeypatch, tmp_path, [4.0, wrong])
    assert status == 1
    assert float(rows[1]["relative"]) > 1e-3


def test_a_run_that_logged_too_little_is_not_compared(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="steps=2"):
        run(bench, monkeypatch, tmp_path, [4.0], one=(4.0,))


def test_one_process_has_nothing_to_be_compared_with(bench: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ranks: 1"):
        bench.main(["--text", "x", "--out", str(tmp_path / "x.csv"), "--ranks", "1"])
