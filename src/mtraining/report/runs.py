"""What a report reads: a run folder or a folder of evaluation results, with whatever is missing or broken in it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mtraining.errors import UserError
from mtraining.evaluate.results import RESULTS, Key, Results
from mtraining.ring.timeline import PHASES
from mtraining.train.about import ABOUT
from mtraining.train.balance import BALANCE, RING
from mtraining.train.evaluation import MARK
from mtraining.train.metrics import METRICS

_BY_HEAD = "recall_by_head"
# A run that wrote nothing for this many of its steps, and for a minute, is taken as ended.
_SILENT_STEPS, _SILENT_SECONDS = 20, 60


@dataclass
class Run:
    """One run as its folder tells it.

    Attributes:
        name: the folder's name, with its parents' where several runs share it.
        steps: records of training steps, in ascending order, one a step.
        evaluations: records of evaluations, in ascending order.
        config: the configuration by section; empty where it cannot be read.
        balance: entries of balance.json: load by rank and ring step under each layout.
        ring: ring.json: seconds of each ring step on some ranks, by phase; empty where that cannot be read.
        about: environment and predicted memory, as the run wrote them when it began.
        scores: lines of evaluation results in the folder or one folder below.
        missing: sentences that say what this folder lacks.
        state: finished, running, or ended early, in words.
    """

    name: str
    folder: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    balance: list[dict[str, Any]] = field(default_factory=list)
    ring: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    scores: list[tuple[Key, dict[str, Any]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    state: str = ""

    def option(self, section: str, name: str) -> Any:
        """An option of the configuration; None where it is not there."""
        part = self.config.get(section)
        return part.get(name) if isinstance(part, dict) else None

    @property
    def pattern(self) -> str | None:
        """The name of the pattern that the run trained with."""
        return self.option("pattern", "name")

    @property
    def planned(self) -> int | None:
        """Steps that the run was asked for."""
        steps = self.option("train", "steps")
        return steps if isinstance(steps, int) else None

    @property
    def done(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def seconds_left(self) -> float | None:
        """Steps that are left times the median of the last 50 steps' seconds; None for a run without an end."""
        seconds = sorted(known(self.steps[-50:], "step_seconds"))
        if self.planned is None or not seconds:
            return None
        return max(0, self.planned - self.done) * seconds[len(seconds) // 2]


def number(value: Any) -> float | None:
    """``value`` where it is a finite number; None for anything else."""
    # Millions of values come through here, and nearly all of them are plain floats.
    if type(value) is float or type(value) is int:
        return float(value) if math.isfinite(value) else None
    return None


def numbers(value: Any) -> list[float | None]:
    """A list of numbers, None where an entry is none; empty for anything that is no list."""
    return [number(item) for item in value] if isinstance(value, list) else []


def known(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    """The finite values of ``name`` among the records."""
    return [value for record in records if (value := number(record.get(name))) is not None]


def read_runs(folders: Sequence[Path], empty: bool = False) -> list[Run]:
    """Read every folder.

    Args:
        empty: runs without a first step are runs too, even if there is nothing else.

    Raises:
        UserError: a folder that does not exist, or none of them holds a step or a result.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"report: {folder} is no folder; give the output folder of a run.")
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    if not empty and not any(run.steps or run.evaluations or run.scores for run in runs):
        named = ", ".join(str(folder) for folder in folders)
        raise UserError(
            f"report: {named} holds neither {METRICS} with a step nor {RESULTS}; give the folder of a run or of "
            "mtraining evaluate, or --watch to wait for a first step."
        )
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise UserError("report: a run is named twice; name each run once.")


def read_run(folder: Path, name: str) -> Run:
    """Read one folder. What cannot be read is left out and said in ``missing``."""
    run = Run(name, folder)
    _read_metrics(run)
    run.config = _read(run, "config.yaml", "its options", yaml.safe_load)
    run.about = _read(run, ABOUT, "environment and predicted memory", json.loads)
    layouts = _read(run, BALANCE, "load of ranks and ring steps", json.loads).get("layouts")
    run.balance = [entry for entry in layouts or [] if _is_load(entry)]
    if any("ring_exposed_fraction" in record for record in run.steps):
        ring = _read(run, RING, "ring steps of each rank", json.loads)
        run.ring = ring if _is_ring(ring) else {}
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        run.scores += list(Results(place, writes=False).lines()) if (place / RESULTS).is_file() else []
    if run.scores and not run.steps:
        # A folder of mtraining evaluate has no training to miss.
        run.missing.clear()
    run.state = _state(run)
    return run


def _read_metrics(run: Run) -> None:
    path = run.folder / METRICS
    if not path.is_file():
        run.missing.append(f"no {METRICS}: the run has made no step")
        return
    lines = path.read_bytes().splitlines()
    broken, repeated = 0, 0
    by_step: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    heads: dict[str, Any] = {}
    for line in lines:
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            broken += 1
            continue
        if type(step) is not int:
            broken += 1
            continue
        kind = evaluations if MARK in record else by_step
        if _BY_HEAD in record:  # by far the longest value, and only the last one is shown
            heads.pop(_BY_HEAD, None)
            heads = record
        repeated += step in kind
        kind[step] = record
    run.steps = [by_step[step] for step in sorted(by_step)]
    run.evaluations = [evaluations[step] for step in sorted(evaluations)]
    if broken:
        run.missing.append(f"{broken} of {len(lines)} lines of {METRICS} cannot be read and are left out")
    if repeated:
        run.missing.append(f"{repeated} records were written again after a resume; the later ones are shown")
    lost = sum(number(record.get("loss")) is None for record in run.steps)
    if lost:
        run.missing.append(f"{lost} steps have no finite loss")
    gaps = run.done - len(run.steps)
    if run.steps and gaps:
        run.missing.append(f"{gaps} steps up to step {run.done} have no record")


def _read(run: Run, name: str, what: str, parsed: Callable[[str], Any]) -> dict[str, Any]:
    """The mapping in a file that tells ``what``; empty where there is none."""
    try:
        found = parsed((run.folder / name).read_text(encoding="utf-8"))
    except OSError:
        run.missing.append(f"no {name}: {what} are not known")
        return {}
    except (yaml.YAMLError, ValueError):
        run.missing.append(f"{name} cannot be read")
        return {}
    return found if isinstance(found, dict) else {}


def _is_load(entry: Any) -> bool:
    """Whether an entry of balance.json has a rectangular load."""
    load = entry.get("load") if isinstance(entry, dict) else None
    if not isinstance(load, list) or not load or not isinstance(entry.get("world"), int):
        return False
    return all(
        isinstance(row, list) and len(row) == len(load[0]) and None not in numbers(row) for row in load
    )


def _is_ring(ring: dict[str, Any]) -> bool:
    """Whether ring.json has a line of numbers for each of its ranks."""
    ranks = ring.get("ranks")
    for phase in PHASES:
        part = ring.get(phase)
        lines = [part.get("compute"), part.get("exposed")] if isinstance(part, dict) else [None]
        if not isinstance(ranks, list) or any(not isinstance(x, list) or len(x) != len(ranks) for x in lines):
            return False
        if any(None in numbers(line) or not numbers(line) for x in lines if x for line in x):
            return False
    return True


def _state(run: Run) -> str:
    if not run.steps:
        return "evaluation results" if run.scores else "no step yet"
    if run.planned is None:
        return f"step {run.done}; how many were planned is not known"
    if run.done >= run.planned:
        return "finished"
    silence = time.time() - (run.folder / METRICS).stat().st_mtime
    step = max(known(run.steps[-50:], "step_seconds"), default=0.0)
    if silence < max(_SILENT_SECONDS, _SILENT_STEPS * step):
        return "running"
    return f"ended early, {duration(silence)} ago"


def duration(seconds: float) -> str:
    """Seconds in the largest fitting unit: ``45 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    for limit, unit, text in ((120, 1, "{:.0f} s"), (7200, 60, "{:.0f} min"), (172800, 3600, "{:.1f} h")):
        if seconds < limit:
            return text.format(seconds / unit)
    return f"{seconds / 86400:.1f} days"
