"""Tables of a study: differences are paired by document, what is missing is named, nothing is made up."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def evaluation(step: int, losses: list[list[float]], **other: Any) -> dict[str, Any]:
    row = {
        "attention": "train", "length": 1024, "bucket": 128, "documents": [str(n) for n in range(len(losses))],
        "by_sequence": losses,
    }  # fmt: skip
    return {"step": step, "evaluation": "x", "held_out": [row | other]}


def training(step: int, **other: Any) -> dict[str, Any]:
    return {"step": step, "loss": 5.0 / step, "step_seconds": 2.0, **other}


def write(study: Path, run: str, records: list[dict[str, Any]]) -> None:
    folder = study / "runs" / run
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def plan() -> Any:
    from arms import read_plan

    return read_plan("extend.yaml", "smoke").chosen(["dense", "recommended", "moba"], None)


def test_differences_are_of_the_same_seed_step_and_documents(tmp_path: Path, plan: Any) -> None:
    from found import Study, held_out_rows

    write(
        tmp_path,
        "dense-0",
        [evaluation(0, [[9, 9]] * 3), training(1), evaluation(1, [[1, 2], [3, 4], [5, 6]])],
    )
    write(tmp_path, "recommended-0", [training(1), evaluation(1, [[1.5, 2], [3.5, 4], [5.5, 7]])])
    write(tmp_path, "moba-0", [training(1), evaluation(1, [[1, 2], [3, 4]])])
    rows = held_out_rows(Study(tmp_path, plan))
    found = {(row["arm"], row["step"], row["from"]): row for row in rows}
    first, second = (found["recommended", 1, start] for start in (0, 128))
    # Every document is half a nat worse, so that drawing them anew changes nothing.
    assert (first["difference"], first["low"], first["high"]) == pytest.approx((0.5, 0.5, 0.5))
    assert second["difference"] == pytest.approx(1 / 3)
    assert second["low"] == 0 and second["high"] > 1 / 3
    assert found["recommended", 1, "all"]["difference"] == pytest.approx((0.5 + 1 / 3) / 2)
    assert found["moba", 1, 0]["difference"] is None, "other documents"
    assert found["dense", 1, 0]["difference"] is None


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    from found import interval

    random = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        _, low, high = interval(random.normal(2.0, 1.0, size=40))
        hits += low <= 2.0 <= high
    assert 270 <= hits <= 297
    assert np.isnan(interval(np.array([1.0]))[1])


def test_the_first_step_that_reaches_a_share() -> None:
    from found import steps_to

    given = [(3, 0, 95.0), (1, 0, 20.0), (2, 0, 60.0), (1, 64, 10.0), (3, 64, 40.0)]
    rows = [
        {"model": "dense-0", "read": "dense", "step": step, "from": start, "given": share}
        for step, start, share in given
    ]
    assert {row["from"]: row["step"] for row in steps_to(rows, 50)} == {0: 2, 64: None}
    assert {row["from"]: row["step"] for row in steps_to(rows, 90)} == {0: 3, 64: None}


def test_a_study_of_training_alone_misses_one_thing(tmp_path: Path) -> None:
    """Each arm is held to its own number of steps; figures in which dense attention is a flat line are left out."""
    from arms import read_plan
    from found import Study
    from tables import summarise

    plan = read_plan("pilot.yaml").chosen(["dense", "linear"], None)
    seen = {
        "density": 1.0,
        "layer_density": [1.0],
        "layer_recall": [1.0],
        "uncovered_far": 0,
        "uncovered_run_far": 0,
    }
    write(tmp_path, "dense-0", [training(step, **seen) for step in range(1, 19)])
    write(tmp_path, "linear-0", [training(step, **seen) for step in range(1, 13)])
    assert Study(tmp_path, plan).missing == ["nothing was measured after training"]
    summarise(tmp_path, plan)
    assert [path.name for path in (tmp_path / "summary").glob("*.svg")] == ["loss.svg"]


def test_what_is_missing_is_named(tmp_path: Path, plan: Any) -> None:
    from found import Study
    from tables import summarise

    write(tmp_path, "dense-0", [training(1), training(2)])
    write(tmp_path, "recommended-0", [training(1)])
    (tmp_path / "done").mkdir()
    for piece in ("measure", "tasks"):
        (tmp_path / "done" / f"{piece}-dense-0.json").write_text("{}")
    assert Study(tmp_path, plan).missing == [
        "recommended-0: 1 of 2 steps",
        "moba-0: not trained",
        "recommended-0: nothing measured after training",
    ]
    text = summarise(tmp_path, plan)
    assert "- moba-0: not trained" in text and "Tasks" not in text
    with open(tmp_path / "summary" / "loss.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["step"], row["seconds"], row["loss"]) for row in rows] == [
        ("dense", "1", "2", "5"), ("dense", "2", "4", "2.5"), ("recommended", "1", "2", "5"),
    ]  # fmt: skip
    assert all(row["commit"] for row in rows)
    assert not (tmp_path / "summary" / "tasks.csv").exists()
