"""Scores by task and length, from a folder's results, and the averages that papers report."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from mtraining.evaluate.results import Key
from mtraining.generate.losses import merged, perplexity
from mtraining.sizes import tokens_text

Lines = Iterable[tuple[Key, dict[str, Any]]]
ANSWERED = ("needle", "ruler", "infinitebench")


def summarise(lines: Lines) -> list[dict[str, Any]]:
    """One row for each model, attention, suite and task.

    Returns:
        rows with ``model``, ``attention``, ``suite``, ``task`` and ``lengths``: by length (as text, for JSON) the mean
        ``score`` in percent, or perplexities, or recall; and ``samples``, ``removed`` (prompts that lost their middle),
        ``prompt_tokens`` (mean), ``density`` and ``recall`` of the prefill (means, None where not measured).
        A suite's average over its tasks has the task ``average``.
    """
    groups: dict[tuple[str, str, str, str], dict[int, list[dict[str, Any]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    # A sample made twice counts once.
    for key, record in dict(lines).items():
        task = key.task if key.suite in ANSWERED else key.suite
        groups[key.model, key.attention, key.suite, task][key.length].append(record)
    rows = [
        {
            "model": model, "attention": attention, "suite": suite, "task": task,
            "lengths": {str(length): _cell(suite, by_length[length]) for length in sorted(by_length)},
        }
        for (model, attention, suite, task), by_length in groups.items()
    ]  # fmt: skip
    return rows + _averages(rows)


def _cell(suite: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    common = {
        "samples": len(records),
        "prompt_tokens": _mean([record["prompt_tokens"] for record in records]),
        "density": _mean([record.get("density") for record in records]),
        "recall": _mean([record.get("recall") for record in records]),
    }
    if suite in ANSWERED:
        return common | {
            "score": 100 * sum(record["score"] for record in records) / len(records),
            "removed": sum(record["removed"] > 0 for record in records),
        }
    if suite == "recall":
        layers = [record["recall_by_layer"] for record in records]
        return common | {"recall_by_layer": [_mean(layer) for layer in zip(*layers, strict=True)]}
    if suite == "words":
        return common | {
            "per_word": perplexity(sum(r["nll"] for r in records), sum(r["words"] for r in records)),
            "perplexity": perplexity(sum(r["nll"] for r in records), sum(r["tokens"] for r in records)),
        }
    return common | merged(records)


def _averages(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A suite's mean over its tasks at each length that all of its tasks have."""
    suites: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["suite"] in ANSWERED:
            suites[row["model"], row["attention"], row["suite"]].append(row)
    found = []
    for (model, attention, suite), tasks in suites.items():
        shared = set.intersection(*(set(task["lengths"]) for task in tasks))
        lengths = {
            length: {
                "samples": sum(task["lengths"][length]["samples"] for task in tasks),
                "score": sum(task["lengths"][length]["score"] for task in tasks) / len(tasks),
                "density": _mean([task["lengths"][length]["density"] for task in tasks]),
                "recall": _mean([task["lengths"][length]["recall"] for task in tasks]),
                "tasks": len(tasks),
            }
            for length in sorted(shared, key=int)
        }
        scores = [cell["score"] for cell in lengths.values()]
        found.append(
            {
                "model": model, "attention": attention, "suite": suite, "task": "average", "lengths": lengths,
                "mean": _mean(scores),
                "weighted_up": weighted(scores, rising=True),
                "weighted_down": weighted(scores, rising=False),
            }
        )  # fmt: skip
    return found


def weighted(scores: Sequence[float], rising: bool) -> float | None:
    """RULER's weighted averages over ascending lengths: weights 1, 2, 3, ... in this order, or the other way.

    Source: arXiv 2404.06654, section 4: they stand for use that is mostly long, or mostly short.
    """
    if not scores:
        return None
    weights = range(1, len(scores) + 1) if rising else range(len(scores), 0, -1)
    return sum(weight * score for weight, score in zip(weights, scores, strict=True)) / sum(weights)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells to print: a line for each model, attention and task, a column for each length."""
    lengths = sorted({int(length) for row in rows for length in row["lengths"]})
    cells = []
    for row in rows:
        line = [
            row["model"],
            row["attention"],
            f"{row['suite']} {row['task']}".removesuffix(f" {row['suite']}"),
        ]
        line += [_shown(row["suite"], row["lengths"].get(str(length))) for length in lengths]
        line.append(_shown_density(row))
        cells.append(line)
    return ["model", "attention", "task", *(tokens_text(length) for length in lengths), "density"], cells


def _shown(suite: str, cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if suite in ANSWERED:
        return f"{cell['score']:.1f}"
    if suite == "recall":
        return "-" if cell["recall"] is None else f"{cell['recall']:.3f}"
    return f"{cell['per_word' if suite == 'words' else 'perplexity']:.2f}"


def _shown_density(row: dict[str, Any]) -> str:
    """Density of the prefill at the longest length."""
    known = [cell["density"] for cell in row["lengths"].values() if cell["density"] is not None]
    return f"{known[-1]:.3f}" if known else "-"
