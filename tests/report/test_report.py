"""A report draws what the run folder says, and says in one sentence what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtraining.errors import UserError
from mtraining.report import write_report
from mtraining.report.figures import balance_figure, density_figure, ring_figure
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


def test_missing_files_are_named(run: Path, tmp_path: Path) -> None:
    (run / "balance.json").unlink()
    with pytest.raises(UserError, match=r"balance\.json does not exist"):
        write_report([run], tmp_path / "out")
