"""Trackers by their own libraries, without a network: what they hold after a run and its resume is one run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from test_metrics import curves
from tiny_run import tiny_config

import mtraining.train.loop as loop
from mtraining.errors import UserError
from mtraining.train import checks, trackers
from mtraining.train.config import LogSection
from mtraining.train.metrics import MetricsWriter, read_metrics
from mtraining.train.trackers import IDS, KINDS, open_trackers

STEPS = [1, 2, 3, 4]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__DISABLE_STATS", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def in_tensorboard(run: Path) -> dict[int, float]:
    return dict(curves(run)["loss"])


def in_wandb(run: Path) -> dict[int, float]:
    """From the files that `wandb sync` sends."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, ids = {}, set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        ids.add(path.stem)
        for data in records_of(path):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
                }
                found[items["step"]] = items["loss"]
    assert ids == {f"run-{json.loads((run / IDS).read_text())['wandb']}"}
    return found


def records_of(path: Path) -> list[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, each chunk with a header of seven bytes."""
    data, found, parts, place = path.read_bytes(), [], b"", 7
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            found.append(parts)
            parts = b""
        place += 7 + length
    return found


def in_mlflow(run: Path) -> dict[int, float]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("contexts")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["train.lr"] == "0.01"
    return {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, "loss")}


def in_trackio(run: Path) -> dict[int, float]:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("contexts")
    return {entry["step"]: entry["loss"] for entry in SQLiteStorage.get_logs("contexts", name)}


READ = {"tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow, "trackio": in_trackio}


@pytest.mark.filterwarnings("ignore")  # the libraries' own, of each other
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "mlflow" else name for name in KINDS]
)
def test_a_run_and_its_resume_are_one_run_there(
    name: str, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "tensorboard":
        pytest.importorskip(name)
    if name == "trackio":
        # Its library reads where to write when it is imported.
        from trackio import sqlite_storage

        monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path / "trackio")
    log = {"trackers": [name], "project": "contexts"}
    for steps in (2, 4):
        loop.train(tiny_config(tmp_path / "run", shards, train={"steps": steps}, log=log))
        ids = json.loads((tmp_path / "run" / IDS).read_text()) if (tmp_path / "run" / IDS).exists() else {}
        assert set(ids) == {name} - {"tensorboard"}
    found = READ[name](tmp_path / "run")
    expected = {record["step"]: record["loss"] for record in read_metrics(tmp_path / "run")}
    assert sorted(expected) == STEPS
    assert found == {step: pytest.approx(loss, rel=1e-6) for step, loss in expected.items()}


class Broken:
    """A tracker whose server is gone."""

    name, id = "wandb", "7"

    def __init__(self, *_: Any) -> None:
        self.given: list[int] = []

    def log(self, values: Any, step: int) -> None:
        self.given.append(step)
        raise ConnectionError("no route to host.\nmore of it")

    def close(self, failed: bool) -> None:
        raise AssertionError("closed although it was dropped")


def test_a_tracker_that_fails_ends_alone(tmp_path: Path) -> None:
    told: list[str] = []
    broken = Broken()
    with MetricsWriter(tmp_path, trackers=[broken], tell=told.append) as writer:
        for step in (1, 2):
            writer.write({"step": step, "loss": 1.0})
    assert broken.given == [1]
    assert told == ["log.trackers: wandb: no route to host; its curves end here, metrics.jsonl has them."]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_trackers_are_told_how_a_run_ended(tmp_path: Path) -> None:
    ended: list[bool] = []
    tracker = Broken()
    tracker.close = ended.append  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError), MetricsWriter(tmp_path, trackers=[tracker]):
        raise ZeroDivisionError
    with MetricsWriter(tmp_path, trackers=[tracker]):
        pass
    assert ended == [True, False]


def test_one_that_cannot_begin_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(opening: Any) -> Any:
        raise RuntimeError("No API key configured. Use `wandb login`.\nTraceback")

    monkeypatch.setitem(trackers.KINDS, "wandb", trackers._Kind(refuse, (), "", KINDS["wandb"].remedy))
    sentence = r"wandb cannot begin \(No API key .*\); run `wandb login`, .*, or leave wandb out"
    with pytest.raises(UserError, match=sentence):
        open_trackers(["tensorboard", "wandb"], tmp_path, "p", {}, 0)
    (tmp_path / IDS).write_text('{"wandb": "abc"}')
    with pytest.raises(
        UserError, match=rf"cannot go on with its run abc .* or remove .*{IDS} to begin another"
    ):
        open_trackers(["wandb"], tmp_path, "p", {}, 0)


@pytest.mark.parametrize("name", KINDS)
def test_without_its_package_the_extra_is_named(
    name: str, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    absent = KINDS[name].modules
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module in absent else find(module))
    with pytest.raises(
        UserError, match=rf"log.trackers: {name} needs .* pip install '?(mtraining\[)?{name}\b"
    ):
        checks.check_config(tiny_config(tmp_path / "run", shards, log={"trackers": [name]}))


def test_run_folders_of_before_still_read() -> None:
    assert LogSection.model_validate({"tensorboard": False}).trackers == ()
    assert LogSection.model_validate({"tensorboard": True, "every": 3}).trackers == ("tensorboard",)
    with pytest.raises(UserError, match="wandb stands twice"):
        LogSection(trackers=("wandb", "wandb"))


def test_another_line_of_training_begins_another_run(tmp_path: Path, shards: Path) -> None:
    """After going back a step would be there twice, with two losses."""
    run = tmp_path / "run"
    loop.train(tiny_config(run, shards, checkpoint={"every": 1}, train={"steps": 3}))
    (run / IDS).write_text('{"wandb": "abc"}')
    back = {"every": 1, "resume": "step_00000002"}
    loop.train(tiny_config(run, shards, checkpoint=back, train={"steps": 4}))
    assert not (run / IDS).exists()
    assert (run / "checkpoints" / "left_behind_1" / IDS).exists()
