"""What telemetry costs: the script on a tiny model, and how differences become shares."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from processes import run_command

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "telemetry_cost.py"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_every_item_is_timed(processes: int, tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), "--model", "tiny"]
    command += [
        "--seq-len",
        "512",
        "--density",
        "0.4",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    run_command(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with next(tmp_path.glob("telemetry-cost-*.csv")).open() as file:
        rows = {row["item"]: row for row in csv.DictReader(file)}
    assert ("waits of the ring" in rows) == (processes > 1)
    assert {"none", "coverage counted", "recall (log.recall_rows=128)", "defaults, mean of all steps"} <= set(
        rows
    )
    assert all(float(row["step_ms"]) > 0 for row in rows.values())


def test_rounds_that_are_done_are_known_before_the_last_one(script: Callable[[str], ModuleType]) -> None:
    cost = script("telemetry_cost")
    known = []
    cost.measure(lambda items: 1.0 + len(items), 1, 3, lambda taken: known.append(cost.costs(taken, 10)))
    assert len(known) == 3
    assert [row["step_ms"] for row in known[0]] == [row["step_ms"] for row in known[2]]


def test_a_logged_item_counts_once_in_so_many_steps(script: Callable[[str], ModuleType]) -> None:
    """Each round is compared with its own step without telemetry, whatever the clock does meanwhile."""
    cost = script("telemetry_cost")
    taken = {
        "none": [1.0, 2.0, 3.0], "coverage counted": [1.01, 2.01, 3.01], "index stability": [1.2, 2.2, 3.2],
        "a logged step, defaults": [1.21, 2.21, 3.21],
    }  # fmt: skip
    rows = {row["item"]: row for row in cost.costs(taken, 10)}
    assert rows["coverage counted"]["share_of_step"] == pytest.approx(0.01 / 2)
    assert rows["index stability"]["share_of_step"] == pytest.approx(0.2 / 2 / 10)
    assert rows["index stability"]["noise_ms"] == pytest.approx(0)
    mean = rows["defaults, mean of all steps"]
    assert mean["added_ms"] == pytest.approx(1e3 * (0.01 + 0.02))
    assert mean["share_of_step"] == pytest.approx(0.03 / 2)
    assert mean["noise_ms"] == pytest.approx(0, abs=1e-9)
    taken["a logged step, defaults"] = [1.11, 2.21, 3.31]
    mean = {row["item"]: row for row in cost.costs(taken, 10)}["defaults, mean of all steps"]
    assert mean["noise_ms"] == pytest.approx(1e3 * 0.1 / 10 / 2), "a tenth of what logged steps differ by"


def test_what_is_off_is_not_computed(script: Callable[[str], ModuleType]) -> None:
    cost = script("telemetry_cost")
    counted = cost.IndexMemory.count
    with cost.only({"index stability"}):
        assert cost.IndexMemory.count is not counted and cost.step_module.Observer is cost.Blind
    with cost.only({cost.COVERAGE, cost.RECALL}):
        assert cost.IndexMemory.count is counted and cost.step_module.Observer is not cost.Blind
    assert {item for items in cost.variants(2).values() for item in items} >= {*cost.LOGGED, cost.RING}
