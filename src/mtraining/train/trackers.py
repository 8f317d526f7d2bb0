"""Where a run's numbers are shown beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow and Trackio.

Each is written by its own library, which reads its own environment variables (WANDB_MODE=offline,
MLFLOW_TRACKING_URI). A resumed run goes on in the same run of a tracker: `trackers.json` of the run folder has its id.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mtraining.errors import UserError, first_line
from mtraining.inputs.text import replace_text

IDS = "trackers.json"
_PARAMETERS_AT_ONCE = 100  # that MLflow takes in one request
_LONGEST_PARAMETER = 6000  # characters that MLflow takes


class Tracker(Protocol):
    """One tracker's run.

    Attributes:
        name: as `log.trackers` has it.
        id: of its run there, by which a resumed run finds it again; "" for none.
    """

    name: str
    id: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step, counted from 1."""

    def close(self, failed: bool) -> None:
        """Write what is left, and say how the run ended."""


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with.

    Attributes:
        run: the run folder.
        project: the project, or experiment, that the tracker's run belongs to.
        options: every option of the run by its dotted name.
        step: steps that are done.
        id: of the tracker's run that is gone on with; "" begins one.
    """

    run: Path
    project: str
    options: Mapping[str, Any]
    step: int
    id: str = ""

    @property
    def name(self) -> str:
        return self.run.resolve().name


class TensorBoard:
    """Files in `tensorboard/` of the run folder."""

    name, id = "tensorboard", ""

    def __init__(self, opening: Opening) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier run logged from this step on is shown no more, steps before the first checkpoint included.
        first = opening.step + 1 if opening.step else 0
        self._writer = SummaryWriter(str(opening.run / "tensorboard"), purge_step=first)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, with its files in `wandb/` of the run folder."""

    name = "wandb"

    def __init__(self, opening: Opening) -> None:
        import wandb

        self.id = opening.id or secrets.token_hex(4)
        self._run = wandb.init(
            project=opening.project,
            name=opening.name,
            id=self.id,
            dir=str(opening.run),
            config=dict(opening.options),
            resume="allow",
            allow_val_change=True,
            settings=wandb.Settings(console="off"),
        )
        # Its own steps cannot go back, as those of a run that resumes do.
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, in `mlflow.db` of the run folder where MLFLOW_TRACKING_URI names no other place."""

    name = "mlflow"

    def __init__(self, opening: Opening) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{opening.run.resolve() / 'mlflow.db'}"
        self._client = MlflowClient(uri)
        self.id = opening.id
        if self.id:
            self._client.update_run(self.id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(opening.project)
        experiment = self._client.create_experiment(opening.project) if found is None else found.experiment_id
        self.id = self._client.create_run(experiment, run_name=opening.name).info.run_id
        given = [Param(key, str(value)[:_LONGEST_PARAMETER]) for key, value in opening.options.items()]
        for start in range(0, len(given), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self.id, params=given[start : start + _PARAMETERS_AT_ONCE])

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self.id, metrics=[self._metric(key, value, now, step) for key, value in values.items()]
        )

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


class Trackio:
    """A run of Trackio, on this machine; its runs go by name."""

    name = "trackio"

    def __init__(self, opening: Opening) -> None:
        import trackio

        self.id = opening.id or f"{opening.name}-{secrets.token_hex(4)}"
        self._run = trackio.init(
            project=opening.project,
            name=self.id,
            config=dict(opening.options),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


@dataclass(frozen=True)
class _Kind:
    """A tracker's class, the modules it needs, what pip installs them by, and what to do where it cannot begin."""

    make: Callable[[Opening], Tracker]
    modules: tuple[str, ...]
    install: str
    remedy: str


KINDS = {
    "tensorboard": _Kind(TensorBoard, ("tensorboard",), "tensorboard", "look at the run folder"),
    "wandb": _Kind(
        WeightsAndBiases, ("wandb",), "'mtraining[wandb]'", "run `wandb login`, or set WANDB_MODE=offline"
    ),
    "mlflow": _Kind(
        MLflow,
        ("mlflow", "sqlalchemy"),
        "'mtraining[mlflow]'",
        "set MLFLOW_TRACKING_URI to a server or database",
    ),
    "trackio": _Kind(Trackio, ("trackio",), "'mtraining[trackio]'", "look at TRACKIO_DIR"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed, naming the extra that has it."""
    for name in names:
        if any(importlib.util.find_spec(module) is None for module in KINDS[name].modules):
            raise UserError(
                f"log.trackers: {name} needs a package that is not installed; run: pip install {KINDS[name].install}, "
                f"or leave {name} out."
            )


def open_trackers(
    names: Sequence[str], run: Path, project: str, options: Mapping[str, Any], step: int
) -> list[Tracker]:
    """Open each tracker: the run of it that this run folder began, or a new one.

    Args:
        options: every option of the run by its dotted name.
        step: steps that are done.

    Raises:
        UserError: a tracker that cannot begin, with what its library says.
    """
    path = run / IDS
    ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    opened: list[Tracker] = []
    for name in names:
        opening = Opening(run, project, options, step, ids.get(name, ""))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what the libraries import
                tracker = KINDS[name].make(opening)
        except Exception as error:  # each library has kinds of its own
            for other in opened:
                other.close(failed=True)
            raise UserError(_cannot_begin(opening, name, path, error)) from error
        opened.append(tracker)
    ids |= {tracker.name: tracker.id for tracker in opened if tracker.id}
    if ids:
        replace_text(path, json.dumps(ids, indent=1) + "\n")
    return opened


def _cannot_begin(opening: Opening, name: str, ids: Path, error: Exception) -> str:
    why, remedy = first_line(error).rstrip("."), KINDS[name].remedy
    if not opening.id:
        return f"log.trackers: {name} cannot begin ({why}); {remedy}, or leave {name} out."
    return (
        f"log.trackers: {name} cannot go on with its run {opening.id} ({why}); {remedy}, or remove {ids} to begin "
        "another one."
    )


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The curves of a record of `metrics.jsonl`.

    A list, of values by layer, is one curve an entry, and a list of lists, by layer and head, one an entry of each.
    None, for a value that is not finite, has no point.
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            inner = {f"{key}/{index:02d}": item for index, item in enumerate(value) if item is not None}
            found |= numbers(inner)
        elif isinstance(value, (int, float)) and key != "step":
            found[key] = value
    return found
