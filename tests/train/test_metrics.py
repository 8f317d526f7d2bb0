"""metrics.jsonl and TensorBoard: the same numbers in both, cut at a resume, and safe from a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtraining.errors import UserError
from mtraining.train.evaluation import curves as evaluation_curves
from mtraining.train.metrics import METRICS, MetricsWriter, read_metrics
from mtraining.train.store import full_disk_told
from mtraining.train.trackers import Tracker, open_trackers


def record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "lr": 0.1 * step, "layer_density": [0.25 * step, 0.5]}


def board(run: Path, step: int = 0) -> list[Tracker]:
    return open_trackers(["tensorboard"], run, "tests", {}, step)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from a run folder."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_what_the_file_holds(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, trackers=board(tmp_path)) as writer:
        for step in (1, 2, 3):
            writer.write(record(step))
    assert read_metrics(tmp_path) == [record(step) for step in (1, 2, 3)]
    found = curves(tmp_path)
    assert set(found) == {"loss", "lr", "layer_density/00", "layer_density/01"}
    for key in ("loss", "lr"):
        assert found[key] == [(step, pytest.approx(record(step)[key])) for step in (1, 2, 3)]
    assert found["layer_density/00"] == [(1, 0.25), (2, 0.5), (3, 0.75)]


def test_evaluations_have_lines_and_curves_of_their_own(tmp_path: Path) -> None:
    """A run that is begun anew drops the evaluation of step 0 from both, as it does steps."""
    evaluation = {
        "step": 0, "evaluation": "abc", "held_out_loss": 3.0, "evaluation_seconds": 1.0,
        "held_out": [{"attention": "train", "length": 256, "loss": 3.0, "by_position": [4.0, 2.0]}],
        "suites": [{"suite": "needle", "attention": "dense", "task": "needle_words", "length": 256, "score": 40.0}],
    }  # fmt: skip
    for loss in (9.0, 3.0):
        with MetricsWriter(tmp_path, trackers=board(tmp_path)) as writer:
            evaluation["held_out_loss"] = loss
            writer.write(evaluation, evaluation_curves(evaluation))
            writer.write(record(1))
    assert read_metrics(tmp_path) == [evaluation, record(1)]
    found = curves(tmp_path)
    assert found["held_out_loss"] == [(0, 3.0)]
    assert found["held_out/train/256/loss"] == [(0, 3.0)]
    assert found["held_out/train/256/by_position/00"] == [(0, 4.0)]
    assert found["held_out/train/256/by_position/01"] == [(0, 2.0)]
    assert found["needle/dense/needle_words/256"] == [(0, 40.0)]
    with MetricsWriter(tmp_path, step=1, trackers=board(tmp_path, 1)) as writer:
        assert writer.kept == [evaluation, record(1)]
    assert curves(tmp_path)["held_out_loss"] == [(0, 3.0)]


def test_resuming_drops_what_lay_ahead_in_both(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, trackers=board(tmp_path)) as writer:
        for step in (1, 2, 3, 4):
            writer.write(record(step))
    with MetricsWriter(tmp_path, step=2, trackers=board(tmp_path, 2)) as writer:
        writer.write({"step": 3, "loss": 9.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert curves(tmp_path)["loss"] == [(1, 1.0), (2, 0.5), (3, 9.0)]


class FullDisk:
    """A file that takes `room` bytes, and then what is given by `room` again."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def close(self) -> None:
        self.file.close()


def test_a_full_disk_delays_records_and_loses_none(tmp_path: Path) -> None:
    told: list[str] = []
    with MetricsWriter(tmp_path, tell=told.append) as writer:
        writer.write(record(1))
        disk = FullDisk(writer._file, room=10)
        writer._file = disk  # type: ignore[assignment]
        writer.write(record(2))
        writer.write(record(3))
        assert [r["step"] for r in read_metrics(tmp_path)] == [1]
        assert len(told) == 1 and "the disk is full" in told[0]
        disk.room = 10**6
        writer.write(record(4))
        assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert len(told) == 1
    for line in (tmp_path / METRICS).read_text().splitlines():
        json.loads(line)


def test_records_that_never_found_room_are_counted(tmp_path: Path) -> None:
    told: list[str] = []
    with MetricsWriter(tmp_path, tell=told.append) as writer:
        writer._file = FullDisk(writer._file, room=0)  # type: ignore[assignment]
        writer.write(record(1))
        writer.write(record(2))
    assert "its last 2 records are lost" in told[-1]


def test_tensorboard_on_a_full_disk_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with MetricsWriter(tmp_path, trackers=board(tmp_path), tell=told.append) as writer:

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        files = writer._trackers[0]._writer  # type: ignore[attr-defined]
        monkeypatch.setattr(files, "add_scalar", refuse)
        writer.write(record(1))
        writer.write(record(2))
        files.close()
    assert told == [
        "log.trackers: tensorboard: the disk is full; its curves end here, metrics.jsonl has them."
    ]
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), full_disk_told(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
    with (
        pytest.raises(UserError, match=r"the disk is full; free space .* go on from the start"),
        full_disk_told(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match="the disk is full"), full_disk_told(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
