"""A report draws what the run folder says, and says in one sentence what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtraining.errors import UserError
from mtraining.report import write_report
from mtraining.report.figures import balance_figure, density_figure, evaluation_figure, ring_figure
from mtraining.ring.timeline import PHASES

ENTRIES = [
    {
        "layout": name, "world": world, "worker": worker, "step": 1.5,
        "load": [[world + rank + step for step in range(world)] for rank in range(world)],
    }
    for world in (2, 4)
    for name, worker in (("zigzag", 2.5), ("striped", 1.0))
]  # fmt: skip

TIMES = ("compute", "exposed")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "sparse"
    folder.mkdir()
    ring = {f"ring_{phase}_{what}": [0.004, 0.002] for phase in ("forward", "backward") for what in TIMES}
    records = [
        {"step": step, "loss": 5.0 - step, "tokens_per_second": 100.0, "layer_density": [0.2, 0.3], **ring}
        for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "balance.json").write_text(json.dumps({"step": 2, "layouts": ENTRIES}))
    return folder


def test_report_writes_figures_and_a_page(run: Path, tmp_path: Path) -> None:
    written = write_report([run], tmp_path / "out")
    figures = ["balance.svg", "training.svg", "density.svg", "ring.svg"]
    assert [path.name for path in written] == [*figures, "report.html"]
    page = written[-1].read_text()
    assert page.count("<svg") == 4 and "3.0000" in page


def test_balance_figure_shows_the_loads_it_was_given() -> None:
    figure = balance_figure(ENTRIES, world=8)  # the largest ring there is has 4 ranks
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title().split(":")[0] for axes in panels] == ["zigzag", "striped"]
    assert "2.50x" in panels[0].get_title()
    assert panels[1].images[0].get_array().tolist() == ENTRIES[3]["load"]


def test_density_is_left_out_when_not_observed() -> None:
    assert density_figure([{"step": 1, "loss": 1.0}]) is None


def test_ring_figure_stacks_waits_on_computing_of_the_last_timed_step() -> None:
    early, late = (
        {
            "step": step,
            **{f"ring_{phase}_{what}": [seconds, 2 * seconds] for phase in PHASES for what in TIMES},
        }
        for step, seconds in ((1, 0.5), (2, 0.001))
    )
    figure = ring_figure([early, late, {"step": 3}])
    assert figure is not None
    for axes in figure.axes:
        assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0, 1), (0, 2), (1, 1), (2, 2)]
        assert axes.get_title().endswith("step 2")
    assert ring_figure([{"step": 1, "loss": 1.0}]) is None


def an_evaluation(step: int, loss: float, score: float | None = None) -> dict[str, Any]:
    rows = [
        {
            "attention": "train",
            "length": length,
            "loss": loss + over,
            "bucket": length // 2,
            "by_position": [loss, 1.0],
        }
        for length, over in ((128, 0.5), (256, 0.0))
    ]
    record = {"step": step, "evaluation": "x", "held_out_loss": loss, "held_out": rows}
    if score is not None:
        record["suites"] = [
            {
                "suite": "needle",
                "attention": "train",
                "task": task,
                "length": 256,
                "samples": 5,
                "score": score,
            }
            for task in ("needle_words", "needle_numbers")
        ]
    return record


def test_evaluations_are_drawn_by_step_and_by_position(run: Path, tmp_path: Path) -> None:
    records = [
        an_evaluation(0, 5.0),
        {"step": 1, "loss": 4.0},
        an_evaluation(1, 4.0, 20.0),
        an_evaluation(2, 3.0, 60.0),
    ]
    figure = evaluation_figure({"sparse": records, "other": [{"step": 1, "loss": 1.0}]})
    assert figure is not None
    loss, position, score = figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in loss.lines} == {
        "128": [[0, 5.5], [1, 4.5], [2, 3.5]],
        "256": [[0, 5.0], [1, 4.0], [2, 3.0]],
    }
    assert {line.get_label(): line.get_xydata().tolist() for line in position.lines} == {
        "step 0": [[64, 5.0], [192, 1.0]],
        "step 2": [[64, 3.0], [192, 1.0]],
    }
    assert {line.get_label(): line.get_ydata().tolist() for line in score.lines} == {
        "needle_words": [20.0, 60.0],
        "needle_numbers": [20.0, 60.0],
    }
    assert evaluation_figure({"sparse": [{"step": 1, "loss": 1.0}]}) is None


def test_the_page_has_the_last_held_out_loss_and_the_last_step(run: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [an_evaluation(0, 5.5), *lines, an_evaluation(2, 2.75)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = write_report([run], tmp_path / "out")
    assert "evaluation.svg" in [path.name for path in written]
    page = written[-1].read_text()
    assert "<td>2</td><td>3.0000</td><td>2.7500 (step 2)</td>" in page
    (run / "metrics.jsonl").write_text(json.dumps(an_evaluation(0, 5.5)) + "\n")
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl with steps"):
        write_report([run], tmp_path / "out")


def test_missing_files_are_named(run: Path, tmp_path: Path) -> None:
    (run / "balance.json").unlink()
    with pytest.raises(UserError, match=r"balance\.json does not exist"):
        write_report([run], tmp_path / "out")
