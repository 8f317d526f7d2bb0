"""What a study's folder holds, as rows: one list of dictionaries a table, each of its rows with the same keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from arms import Plan, merged, run_folder

from mtraining.evaluate.results import Key, Results
from mtraining.model.key_coverage import BAND_STARTS
from mtraining.train.balance import BALANCE
from mtraining.train.metrics import read_metrics

Row = dict[str, Any]
DENSE = "dense"  # the arm that others are compared with
RESAMPLES = 2000


class Study:
    """The runs and measurements of a study that exist.

    Attributes:
        steps: by (arm, seed), the records of optimizer steps, in order.
        evaluations: by (arm, seed), those of evaluations while training.
        measured: by name of a model (ARM-SEED, or base), the lines of its measurements.
        missing: what the plan has and the folder has not, for a person.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.steps: dict[tuple[str, int], list[Row]] = {}
        self.evaluations: dict[tuple[str, int], list[Row]] = {}
        self.measured: dict[str, list[tuple[Key, Row]]] = {}
        self.missing: list[str] = []
        for arm, seed in plan.runs():
            name, total = f"{arm.name}-{seed}", merged(plan.config, arm.changes)["train"]["steps"]
            records = read_metrics(run_folder(folder, arm.name, seed))
            steps = [record for record in records if "loss" in record]
            if not steps:
                self.missing.append(f"{name}: not trained")
                continue
            if steps[-1]["step"] < total:
                self.missing.append(f"{name}: {steps[-1]['step']} of {total} steps")
            self.steps[arm.name, seed] = steps
            self.evaluations[arm.name, seed] = [one for one in records if "held_out" in one]
        trained = {f"{arm}-{seed}" for arm, seed in self.steps}
        wanted = ["measure", *(["tasks"] if plan.measure.get("tasks") else [])]
        unmeasured = {}
        names = [f"{arm.name}-{seed}" for arm, seed in plan.runs()]
        for name in [*names, *(["base"] if plan.measure.get("base") else [])]:
            # A sample made twice counts once.
            lines = list(dict(Results(folder / "measured" / name, writes=False).lines()).items())
            if lines:
                self.measured[name] = lines
            if name != "base" and name not in trained:
                continue
            if not all((folder / "done" / f"{piece}-{name}.json").exists() for piece in wanted):
                unmeasured[name] = f"{name}: {'not all' if lines else 'nothing'} measured after training"
        if trained and not self.measured and trained <= unmeasured.keys():
            # As `run --train-only` leaves it.
            self.missing.append("nothing was measured after training")
        else:
            self.missing += unmeasured.values()


def arm_rows(study: Study) -> list[Row]:
    """A line for each run: how far it came, how fast, and what its attention computed."""
    train = study.plan.config["train"]
    rows = []
    for (arm, seed), steps in study.steps.items():
        observed = [step for step in steps if "density" in step]
        last = observed[-1] if observed else {}
        rows.append(
            {
                "arm": arm,
                "seed": seed,
                "steps": steps[-1]["step"],
                "tokens": steps[-1]["step"] * train["batch_size"] * train["seq_len"],
                "loss": _mean([step["loss"] for step in steps[-5:]]),
                "tokens_per_second": train["batch_size"] * train["seq_len"] / step_seconds(steps),
                "density": _mean([step["density"] for step in observed]),
                "recall": _mean([step["recall"] for step in observed if "recall" in step]),
                "uncovered_far": last.get("uncovered_far"),
                "uncovered_run_far": last.get("uncovered_run_far"),
            }
        )
    return rows


def step_seconds(steps: Sequence[Row]) -> float:
    """Of a usual step: the first ones compile kernels."""
    return float(np.median([step["step_seconds"] for step in steps[2:] or steps]))


def loss_rows(study: Study) -> list[Row]:
    """A line for each optimizer step, with the seconds of all steps up to it."""
    rows = []
    for (arm, seed), steps in study.steps.items():
        seconds = 0.0
        for step in steps:
            seconds += step["step_seconds"]
            rows.append(
                {"arm": arm, "seed": seed, "step": step["step"], "seconds": seconds, "loss": step["loss"]}
            )
    return rows


def layer_rows(study: Study) -> list[Row]:
    """A line for each layer of each step that was observed.

    ``kept`` is the share of the layer's index that the step before had too; None of patterns that list blocks.
    """
    rows = []
    for (arm, seed), steps in study.steps.items():
        for step in steps:
            densities = step.get("layer_density", ())
            # A list of their own where layers have no value.
            recalls, kept = (
                step.get(name) or [None] * len(densities) for name in ("layer_recall", "layer_stability")
            )
            for layer, density in enumerate(densities):
                rows.append(
                    {
                        "arm": arm, "seed": seed, "step": step["step"], "layer": layer, "density": density,
                        "recall": recalls[layer], "kept": kept[layer],
                    }
                )  # fmt: skip
    return rows


def coverage_rows(study: Study) -> list[Row]:
    """A line for each step that was observed: shares of distances without gradient, in the step and so far."""
    names = ("uncovered", "uncovered_far", "uncovered_run", "uncovered_run_far")
    return [
        {"arm": arm, "seed": seed, "step": step["step"], **{name: step[name] for name in names}}
        for (arm, seed), steps in study.steps.items()
        for step in steps
        if "uncovered" in step
    ]


def key_rows(study: Study) -> list[Row]:
    """A line for each step that was observed and band of distances that the length has: the share of key positions to
    which no query at that distance brought a gradient, in the step and in all steps so far."""
    rows = []
    for (arm, seed), steps in study.steps.items():
        for step in steps:
            for place, start in enumerate(BAND_STARTS):
                if "uncovered_by_distance" in step and start < study.plan.config["train"]["seq_len"]:
                    rows.append(
                        {
                            "arm": arm, "seed": seed, "step": step["step"], "from": start,
                            "in_step": step["uncovered_by_distance"][place],
                            "so_far": step["uncovered_run_by_distance"][place],
                        }
                    )  # fmt: skip
    return rows


def balance_rows(study: Study) -> list[Row]:
    """A line for each run, layout and number of ranks: how uneven the last observed index would be, max over mean of
    work. No rule has a number to tune: all follow from the index and the layout."""
    rows = []
    for arm, seed in study.steps:
        path = run_folder(study.folder, arm, seed) / BALANCE
        entries = json.loads(path.read_text(encoding="utf-8"))["layouts"] if path.exists() else []
        rows += [
            {
                "arm": arm, "seed": seed, "layout": entry["layout"], "ranks": entry["world"],
                "worker": entry["worker"], "step": entry["step"],
            }
            for entry in entries
            if entry["world"] > 1
        ]  # fmt: skip
    return rows


def held_out_rows(study: Study) -> list[Row]:
    """A line for each bucket of positions (and one for all of them) of each evaluation while training.

    ``difference`` is the mean over documents of the loss less that of dense training, of the same seed, step and
    documents, both read by the attention of ``read``; ``low`` and ``high`` bound its central 95 % when documents are
    drawn anew. Dense training has one way of reading, which every other is compared with.
    """
    rows = []
    for (arm, seed), evaluations in study.evaluations.items():
        for record in evaluations:
            for one in record["held_out"]:
                mine = np.array(one["by_sequence"])
                dense = _dense_losses(study, seed, record["step"], one)
                for place in (*range(mine.shape[1]), None):
                    losses = mine.mean(1) if place is None else mine[:, place]
                    row = {
                        "arm": arm, "seed": seed, "step": record["step"],
                        "seconds": step_seconds(study.steps[arm, seed]) * record["step"]
                        if (arm, seed) in study.steps
                        else 0.0,
                        "read": one["attention"], "from": "all" if place is None else place * one["bucket"],
                        "documents": len(losses), "loss": float(losses.mean()), "difference": None, "low": None,
                        "high": None,
                    }  # fmt: skip
                    if dense is not None and arm != DENSE:
                        other = dense.mean(1) if place is None else dense[:, place]
                        row |= dict(zip(("difference", "low", "high"), interval(losses - other), strict=True))
                    rows.append(row)
    return rows


def _dense_losses(study: Study, seed: int, step: int, row: Row) -> np.ndarray | None:
    """By document and bucket, of dense training of this seed and step; None where it has not come so far."""
    for record in study.evaluations.get((DENSE, seed), ()):
        for one in record["held_out"]:
            same = one["length"] == row["length"] and one["documents"] == row["documents"]
            if record["step"] == step and same:
                return np.array(one["by_sequence"])
    return None


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, and the bounds of its central 95 % over resampled entries; of one entry the bounds are NaN."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return mean, float(low), float(high)


def _of(study: Study, suites: Sequence[str] | None) -> Iterator[tuple[str, Key, Row]]:
    for name, lines in study.measured.items():
        for key, record in lines:
            if suites is None or key.suite in suites:
                yield name, key, record


def grid_rows(study: Study) -> list[Row]:
    """A line for each model and way of reading it: held-out loss of all positions, density and recall."""
    rows = []
    for (name, read), records in _grouped(study, ("text",), lambda key: ()).items():
        losses = np.array([record["nll"] / record["tokens"] for record in records])
        mean, low, high = interval(losses)
        rows.append(
            {
                "model": name, "read": read, "documents": len(losses), "loss": mean, "low": low, "high": high,
                "density": _mean([_mean(record["layer_density"]) for record in records]),
                "recall": _mean([_mean(record["layer_recall"]) for record in records]),
            }
        )  # fmt: skip
    return rows


def position_rows(study: Study) -> list[Row]:
    """A line for each bucket of positions of each model and way of reading it."""
    rows = []
    for (name, read), records in _grouped(study, ("text",), lambda key: ()).items():
        losses = np.array([np.array(one["bucket_nll"]) / np.array(one["bucket_tokens"]) for one in records])
        for place in range(losses.shape[1]):
            mean, low, high = interval(losses[:, place])
            rows.append(
                {
                    "model": name, "read": read, "from": place * records[0]["bucket"], "documents": len(losses),
                    "loss": mean, "low": low, "high": high,
                }
            )  # fmt: skip
    return rows


def task_rows(study: Study) -> list[Row]:
    """A line for each task and length of each model and way of reading it; scores in percent."""
    rows = []
    groups = _grouped(study, ("needle", "ruler"), lambda key: (key.suite, key.task, key.length))
    for (name, read, suite, task, length), records in groups.items():
        mean, low, high = interval(100 * np.array([record["score"] for record in records]))
        rows.append(
            {
                "model": name, "read": read, "suite": suite, "task": task, "length": length,
                "samples": len(records), "score": mean, "low": low, "high": high,
            }
        )  # fmt: skip
    return rows


def copy_rows(study: Study) -> list[Row]:
    """A line for each gap of each model and way of reading it: the loss of a span read again, and read first."""
    rows = []
    for (name, read, gap), records in _grouped(study, ("copy",), lambda key: (key.length,)).items():
        mean, low, high = interval(np.array([record["again"] for record in records]))
        rows.append(
            {
                "model": name, "read": read, "gap": gap, "samples": len(records), "again": mean, "low": low,
                "high": high, "first": _mean([record["first"] for record in records]),
            }
        )  # fmt: skip
    return rows


def answer_rows(study: Study) -> list[Row]:
    """A line for each eighth of all distances, checkpoint, run and way of reading: answers that are given.

    One is given where its probability is above one half. ``from`` is the shortest distance of the eighth, in tokens.
    """
    rows = []
    seq_len = study.plan.config["train"]["seq_len"]
    for (name, read, task), records in _grouped(study, ("answers",), lambda key: (key.task,)).items():
        distances = np.concatenate([record["distances"] for record in records])
        given = np.concatenate([record["likely"] for record in records]) > 0.5
        for eighth in range(8):
            here = distances * 8 // seq_len == eighth
            if here.any():
                rows.append(
                    {
                        "model": name, "read": read, "step": int(task.removeprefix("step-")),
                        "from": eighth * seq_len // 8, "answers": int(here.sum()),
                        "given": 100 * float(given[here].mean()),
                    }
                )  # fmt: skip
    return rows


def steps_to(rows: Sequence[Row], share: float) -> list[Row]:
    """Of each run, way of reading and eighth of distances, the first step with ``share`` percent of answers given;
    None where no checkpoint had them."""
    found: dict[tuple[Any, ...], int | None] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        key = row["model"], row["read"], row["from"]
        reached = found.setdefault(key, None)
        if reached is None and row["given"] >= share:
            found[key] = row["step"]
    return [
        {"model": model, "read": read, "from": start, "step": step}
        for (model, read, start), step in found.items()
    ]


def stability_rows(study: Study) -> list[Row]:
    """A line for each layer, model and way of reading: how much of the index of one text the untrained model chose too.

    ``columns`` and ``tiles`` (block diagonals, or listed blocks) are what both have over what either has.
    """
    return [
        {
            "model": name, "read": key.attention, "step": key.task.removeprefix("step-"), "layer": layer,
            "columns": columns, "tiles": tiles,
        }
        for name, key, record in _of(study, ("index",))
        for layer, (columns, tiles) in enumerate(zip(record["columns"], record["tiles"], strict=True))
    ]  # fmt: skip


def _grouped(study: Study, suites: Sequence[str], more: Any) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for name, key, record in _of(study, suites):
        found.setdefault((name, key.attention, *more(key)), []).append(record)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
