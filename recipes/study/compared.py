"""Models compared on the same samples: the differences that a study's questions are answered by.

A difference is that of two losses or scores of one document, gap or prompt. Its interval is over samples drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from found import DENSE, Row, Study, arm_rows, held_out_rows, interval

from mtraining.evaluate.results import Key

OWN = "own"

# The questions, as the table names them.
TO_DENSE = "to dense training"
FROZEN = "index frozen, to evolving"
FULL = "read with full attention, to its own pattern"
NOISE = "second seed, to the first"

# Measures, as the table names them; tasks have their own names.
LOSS, COPY = "held-out loss", "loss of a copy"
ANSWERS = "answers given at step"
WITHIN = 0.01  # of dense training's loss, at every bucket of positions
SPARSE, TIME = 0.9, 0.5  # sparsity at least, and time of a step of dense training's at most


@dataclass(frozen=True)
class Side:
    """A model and how it is read."""

    model: str
    read: str


def compared_rows(study: Study) -> list[Row]:
    """A line for each comparison and measure: both means, their difference, and the bounds of its central 95 %."""
    rows = []
    for question, one, other in _comparisons(study):
        mine, theirs = (_values(study, side) for side in (one, other))
        for measure, values in mine.items():
            shared = [sample for sample in values if sample in theirs.get(measure, {})]
            if not shared:
                continue
            pairs = np.array([[values[sample], theirs[measure][sample]] for sample in shared])
            difference, low, high = interval(pairs[:, 0] - pairs[:, 1])
            rows.append(
                {
                    "question": question, "model": one.model, "read": one.read, "against": other.model,
                    "against_read": other.read, "measure": measure[0], "at": measure[1], "samples": len(shared),
                    "value": float(pairs[:, 0].mean()), "other": float(pairs[:, 1].mean()),
                    "difference": difference, "low": low, "high": high,
                }
            )  # fmt: skip
    return rows


def _comparisons(study: Study) -> Iterator[tuple[str, Side, Side]]:
    reads: dict[str, list[str]] = {}
    for name, lines in study.measured.items():
        reads[name] = list(dict.fromkeys(key.attention for key, _ in lines))
    for name, ways in reads.items():
        arm, _, seed = name.rpartition("-")
        dense, evolving = f"{DENSE}-{seed}", f"recommended-{seed}"
        if arm and arm != DENSE and dense in reads:
            yield from ((TO_DENSE, Side(name, way), Side(dense, DENSE)) for way in ways)
        if arm == "frozen" and evolving in reads:
            yield from (
                (FROZEN, Side(name, way), Side(evolving, way)) for way in ways if way in reads[evolving]
            )
        sparse = OWN if OWN in ways else "sparse" if "sparse" in ways else None
        if sparse and DENSE in ways:
            yield FULL, Side(name, DENSE), Side(name, sparse)
        if arm and seed != "0" and f"{arm}-0" in reads:
            yield from (
                (NOISE, Side(name, way), Side(f"{arm}-0", way)) for way in ways if way in reads[f"{arm}-0"]
            )


def _values(study: Study, side: Side) -> dict[tuple[str, Any], dict[Any, float]]:
    """By measure and where it was taken, the value of each sample."""
    found: dict[tuple[str, Any], dict[Any, float]] = {}

    def put(measure: str, at: Any, sample: Any, value: float) -> None:
        found.setdefault((measure, at), {})[sample] = value

    for key, record in study.measured[side.model]:
        if key.attention == side.read:
            for suite, take in _TAKEN.items():
                if key.suite in suite:
                    take(key, record, put)
    return found


Put = Callable[[str, Any, Any, float], None]


def _text(key: Key, record: Row, put: Put) -> None:
    put(LOSS, "all", key.task, record["nll"] / record["tokens"])
    for place, (nll, tokens) in enumerate(zip(record["bucket_nll"], record["bucket_tokens"], strict=True)):
        put(LOSS, place * record["bucket"], key.task, nll / tokens)


def _copy(key: Key, record: Row, put: Put) -> None:
    put(COPY, key.length, key.number, record["again"])


def _task(key: Key, record: Row, put: Put) -> None:
    put(key.task, key.length, key.number, 100 * record["score"])


def _answers(key: Key, record: Row, put: Put) -> None:
    step = int(key.task.removeprefix("step-"))
    given = np.array(record["likely"]) > 0.5
    put(f"{ANSWERS} {step}", "all", key.number, 100 * float(given.mean()))


_TAKEN: dict[tuple[str, ...], Callable[[Key, Row, Put], None]] = {
    ("text",): _text,
    ("copy",): _copy,
    ("needle", "ruler"): _task,
    ("answers",): _answers,
}


def bar_rows(study: Study) -> list[Row]:
    """A line for each sparsely trained model and way of reading it: whether it is what the study asks for.

    ``worst`` is the largest difference to dense training over buckets of positions, in percent of its loss.
    ``tasks_below`` counts tasks whose interval lies below that of dense training. ``met`` is "yes", "no", or "so far"
    where no task was measured.
    """
    rows = []
    arms = {f"{row['arm']}-{row['seed']}": row for row in arm_rows(study)}
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in compared_rows(study):
        if row["question"] == TO_DENSE:
            groups.setdefault((row["model"], row["read"], row["against"]), []).append(row)
    for (model, read, against), lines in groups.items():
        buckets = [row for row in lines if row["measure"] == LOSS and row["at"] != "all"]
        if not buckets or not {model, against} <= arms.keys():
            continue
        worst = max(buckets, key=lambda row: row["difference"] / row["other"])
        tasks = [row for row in lines if row["measure"] not in (LOSS, COPY)]
        below = sum(row["high"] < 0 for row in tasks)
        density = arms[model]["density"]
        time = arms[against]["tokens_per_second"] / arms[model]["tokens_per_second"]
        met = worst["difference"] <= WITHIN * worst["other"] and not below
        met = met and density is not None and 1 - density >= SPARSE and time <= TIME
        rows.append(
            {
                "model": model, "read": read, "density": density, "time": time, "worst_from": worst["at"],
                "worst": 100 * worst["difference"] / worst["other"],
                "worst_low": 100 * worst["low"] / worst["other"], "worst_high": 100 * worst["high"] / worst["other"],
                "tasks": len(tasks), "tasks_below": below,
                "met": "no" if not met else "yes" if tasks else "so far",
            }
        )  # fmt: skip
    return rows


def time_rows(study: Study) -> list[Row]:
    """A line for each evaluation while training: its loss, and that of dense training after the same seconds of steps.

    Dense losses are joined by straight lines; None beyond the last of them, or before the first.
    """
    rows = []
    whole = [row for row in held_out_rows(study) if row["from"] == "all"]
    for row in whole:
        dense = sorted(
            (other["seconds"], other["loss"])
            for other in whole
            if other["arm"] == DENSE
            and other["seed"] == row["seed"]
            and other["documents"] == row["documents"]
        )
        equal = None
        if len(dense) > 1 and dense[0][0] <= row["seconds"] <= dense[-1][0]:
            equal = float(np.interp(row["seconds"], *zip(*dense, strict=True)))
        shown = {key: row[key] for key in ("arm", "seed", "step", "seconds", "read", "loss")}
        rows.append(shown | {"dense_after_same_seconds": equal})
    return rows
