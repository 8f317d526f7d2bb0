"""Comparisons of a study against sums done by hand, and the archives and pages that results travel in."""

import itertools
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtraining.errors import UserError
from mtraining.evaluate.results import Key, Results

Line = tuple[str, str, str, int, int, dict[str, Any]]


def measured(study: Path, name: str, lines: list[Line]) -> None:
    """Lines of (attention, suite, task, length, number, record)."""
    results = Results(study / "measured" / name, writes=True)
    results.begin({"settings": {}, "models": {name: name}})
    for attention, suite, task, length, number, record in lines:
        results.add(Key(name, attention, suite, task, length, number), record)


def text(attention: str, document: str, first: float, second: float) -> Line:
    """A document of two buckets of 128 positions, with these mean losses."""
    record = {
        "nll": 128 * (first + second), "tokens": 256, "bucket": 128, "bucket_nll": [128 * first, 128 * second],
        "bucket_tokens": [128, 128], "layer_density": [0.5], "layer_recall": [0.9],
    }  # fmt: skip
    return attention, "text", document, 256, 0, record


def trained(study: Path, run: str, seconds: float, density: float) -> None:
    folder = study / "runs" / run
    folder.mkdir(parents=True)
    records = [
        {
            "step": step, "loss": 3.0, "step_seconds": seconds, "density": density,
            "uncovered_by_distance": [0.1, 0, 0, 0], "uncovered_run_by_distance": [0.05, 0, 0, 0],
            "layer_density": [density], "layer_stability": [0.8],
        }
        for step in (1, 2)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    layouts = [{"layout": "striped", "world": world, "worker": 1.1, "step": 1.2} for world in (1, 8)]
    (folder / "balance.json").write_text(json.dumps({"layouts": layouts}))


@pytest.fixture
def plan() -> Any:
    from arms import read_plan

    return read_plan("extend.yaml", "smoke").chosen(["dense", "recommended", "frozen"], None)


@pytest.fixture
def study(tmp_path: Path, plan: Any) -> Any:
    """Dense and recommended on three documents, of which the second is not the same for both; frozen on one."""
    from found import Study

    trained(tmp_path, "dense-0", seconds=4.0, density=1.0)
    trained(tmp_path, "recommended-0", seconds=1.0, density=0.08)
    trained(tmp_path, "frozen-0", seconds=1.0, density=0.08)
    measured(
        tmp_path,
        "dense-0",
        [
            text("dense", "a", 2.0, 4.0), text("dense", "b", 3.0, 4.0), text("dense", "c", 4.0, 4.0),
            ("dense", "copy", "copy", 128, 0, {"again": 1.0, "first": 3.0}),
            ("dense", "needle", "needle_numbers", 256, 0, {"score": 1.0}),
        ],
    )  # fmt: skip
    measured(
        tmp_path,
        "recommended-0",
        [
            text("dense", "a", 2.01, 4.1), text("dense", "c", 4.03, 4.0), text("dense", "z", 9.0, 9.0),
            text("sparse", "a", 2.5, 5.0),
            ("dense", "copy", "copy", 128, 0, {"again": 1.5, "first": 3.0}),
            ("dense", "needle", "needle_numbers", 256, 0, {"score": 1.0}),
        ],
    )  # fmt: skip
    measured(tmp_path, "frozen-0", [text("dense", "a", 2.2, 4.1)])
    return Study(tmp_path, plan)


def found(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def test_differences_are_those_of_the_same_samples(study: Any) -> None:
    from compared import COPY, FROZEN, FULL, LOSS, TO_DENSE, compared_rows

    rows = compared_rows(study)
    to_dense = {"question": TO_DENSE, "model": "recommended-0", "read": "dense"}
    # Documents a and c: differences 0.01 and 0.03 in the first bucket, 0.1 and 0 in the second.
    first, second, both = (found(rows, **to_dense, measure=LOSS, at=at) for at in (0, 128, "all"))
    assert first["samples"] == 2 and first["against"] == "dense-0" and first["against_read"] == "dense"
    assert (first["value"], first["other"]) == pytest.approx((3.02, 3.0))
    # Of two documents, a quarter of all samples has one of them twice, so those are the bounds.
    assert (first["difference"], first["low"], first["high"]) == pytest.approx((0.02, 0.01, 0.03))
    assert (second["difference"], second["low"], second["high"]) == pytest.approx((0.05, 0.0, 0.1))
    assert both["difference"] == pytest.approx(0.035)
    assert found(rows, **to_dense, measure=COPY, at=128)["difference"] == pytest.approx(0.5)
    assert found(rows, question=TO_DENSE, model="recommended-0", read="sparse", measure=LOSS, at=0)[
        "difference"
    ] == pytest.approx(0.5)
    full = found(rows, question=FULL, model="recommended-0", measure=LOSS, at=128)
    assert (full["read"], full["against_read"], full["samples"]) == ("dense", "sparse", 1)
    assert full["difference"] == pytest.approx(4.1 - 5.0)
    frozen = found(rows, question=FROZEN, measure=LOSS, at=0)
    assert frozen["difference"] == pytest.approx(0.19) and math.isnan(frozen["low"])


def test_an_interval_is_that_of_all_samples_drawn_anew() -> None:
    """Against every one of the 4^4 ways to draw four documents."""
    from found import interval

    values = np.array([0.1, -0.2, 0.4, 0.7])
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=4)]
    mean, low, high = interval(values)
    assert mean == pytest.approx(0.25)
    assert (low, high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)
    # By hand: a mean at or below -0.125 takes at least three draws of -0.2. Of 256 ways, (-0.2, -0.2, -0.2, x) has 12
    # for other x and 1 for all: 5.1 %. So the lower bound lies at the lowest of these, x = 0.1 and below.
    assert -0.2 <= low <= -0.05


def test_the_bar_takes_the_worst_bucket(study: Any) -> None:
    from compared import bar_rows

    row = found(bar_rows(study), model="recommended-0", read="dense")
    # 0.05 of 4.0 at the second bucket; 0.02 of 3.0 at the first.
    assert row["worst_from"] == 128 and row["worst"] == pytest.approx(1.25)
    assert (row["time"], row["density"]) == (0.25, 0.08)
    assert (row["tasks"], row["tasks_below"], row["met"]) == (1, 0, "no")
    frozen = found(bar_rows(study), model="frozen-0")
    assert frozen["tasks"] == 0 and frozen["met"] == "no"


def test_keys_are_told_in_bands_that_the_length_has(study: Any) -> None:
    from found import balance_rows, key_rows, layer_rows

    rows = key_rows(study)
    assert {row["from"] for row in rows} == {0}, "the smoke plan has 1,024 tokens"
    assert (rows[0]["in_step"], rows[0]["so_far"]) == (0.1, 0.05)
    assert [(row["arm"], row["ranks"]) for row in balance_rows(study)] == [
        ("dense", 8), ("recommended", 8), ("frozen", 8),
    ]  # fmt: skip
    assert layer_rows(study)[0]["kept"] == 0.8 and layer_rows(study)[0]["recall"] is None


def test_losses_after_the_same_seconds(tmp_path: Path, plan: Any) -> None:
    from compared import time_rows
    from found import Study

    def evaluated(step: int, loss: float) -> str:
        held = {
            "attention": "train",
            "length": 256,
            "bucket": 128,
            "documents": ["a"],
            "by_sequence": [[loss, loss]],
        }
        return json.dumps({"step": step, "held_out": [held]}) + "\n"

    for run, seconds, losses in (("dense-0", 4.0, [5.0, 4.0, 3.0]), ("recommended-0", 1.0, [5.0, 4.5, 4.4])):
        trained(tmp_path, run, seconds, 1.0)
        with open(tmp_path / "runs" / run / "metrics.jsonl", "a") as file:
            file.writelines(evaluated(step, loss) for step, loss in enumerate(losses))
    rows = time_rows(Study(tmp_path, plan))
    last = found(rows, arm="recommended", step=2)
    # Two seconds of dense training are half a step.
    assert (last["seconds"], last["loss"], last["dense_after_same_seconds"]) == pytest.approx((2.0, 4.4, 4.5))
    assert found(rows, arm="dense", step=2)["dense_after_same_seconds"] == 3.0


def test_what_travels_is_all_but_corpus_and_weights(tmp_path: Path) -> None:
    from archive import note, noted, pack, unpack

    one = tmp_path / "one"
    for name in (
        "corpus/tokens/a.bin",
        "runs/x/checkpoints/step/weights",
        "runs/x/metrics.jsonl",
        "done/x.json",
    ):
        (one / name).parent.mkdir(parents=True, exist_ok=True)
        (one / name).write_text(name)
    note(one)
    assert pack(one, tmp_path / "results.tgz") == (tmp_path / "results.tgz").stat().st_size
    with tarfile.open(tmp_path / "results.tgz") as archive:
        files = sorted(member.name for member in archive.getmembers() if member.isfile())
    assert [name for name in files if "about" not in name] == ["./done/x.json", "./runs/x/metrics.jsonl"]
    unpack([tmp_path / "results.tgz"], tmp_path / "two")
    assert noted(tmp_path / "two", "hardware") == noted(one, "hardware") != "unknown"
    assert (tmp_path / "two" / "runs" / "x" / "metrics.jsonl").read_text() == "runs/x/metrics.jsonl"
    (tmp_path / "bad.tgz").write_text("no archive")
    with pytest.raises(UserError, match=r"bad.tgz cannot be unpacked \(.*\); give archives"):
        unpack([tmp_path / "bad.tgz"], tmp_path / "two")


def test_results_become_tables_figures_and_a_page(study: Any, plan: Any, tmp_path: Path) -> None:
    from publish import publish

    root = tmp_path / "repository"
    for name in ("docs/figures/study", "benchmarks/results"):
        (root / name).mkdir(parents=True)
    stale = root / "docs" / "figures" / "study" / "extend-smoke-answers.svg"
    stale.touch()
    (root / "mkdocs.yml").write_text("nav:\n  - Numbers:\n      - Study: study.md\n      - Other: other.md\n")
    (root / "docs" / "study.md").write_text("# Study\n\n<!-- results -->\n\nend\n")
    written = publish(study.folder, plan, "cpu-2026", root)
    names = {path.relative_to(root).as_posix() for path in written}
    assert "benchmarks/results/study-extend-smoke-cpu-2026-compared.csv" in names
    assert all(path.exists() for path in written) and not stale.exists()
    page = (root / "docs" / "study-extend-smoke.md").read_text()
    assert "| recommended-0 | dense | 92.0 % | 0.25 | 128: +1.25" in page
    figures = [name for name in names if name.endswith(".svg")]
    assert figures and all(f"](figures/study/{Path(name).name})" in page for name in figures)
    assert (root / "mkdocs.yml").read_text().splitlines()[2:4] == [
        "      - Study: study.md", "      - Results of extend-smoke: study-extend-smoke.md",
    ]  # fmt: skip
    lines = (root / "docs" / "study.md").read_text().splitlines()
    assert lines[2:4] == ["<!-- results -->", "- [Results of extend-smoke](study-extend-smoke.md)"]
    publish(study.folder, plan, "cpu-2026", root)
    assert (root / "docs" / "study.md").read_text().splitlines() == lines, "named once"
