"""Curves of many steps as few points: the mean of each bucket of steps, with its least and greatest value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from mtraining.report.runs import number, numbers

Column = list[Any]
LEAST_RANGE = 5.0  # of a scale of percentages, in percentage points


def short(value: float | None) -> float | None:
    """``value`` to five significant digits, which is what a chart can show."""
    return None if value is None else float(f"{value:.5g}")


def percents(values: Iterable[float | None]) -> list[float]:
    """A scale for percentages: from the least to the greatest, but no narrower than `LEAST_RANGE`, so that differences
    of nothing do not look like some."""
    found = [value for value in values if value is not None] or [0.0]
    low, high = min(found), max(found)
    low = max(0.0, min(low - max(0.0, LEAST_RANGE - (high - low)) / 2, 100 - LEAST_RANGE))
    return [float(f"{low:.3g}"), min(100.0, float(f"{max(high, low + LEAST_RANGE):.4g}"))]


def bucketed(steps: Sequence[int], values: Sequence[float], points: int) -> dict[str, Column]:
    """A curve in at most ``points`` buckets of equally many records.

    Returns:
        columns: ``step``, the last of each bucket; ``value``, its mean; ``low`` and ``high``, its extremes. Where every
        bucket would hold one record, ``low`` and ``high`` are left out.
    """
    count = len(steps)
    if count <= points:
        return {"step": list(steps), "value": [short(value) for value in values]}
    edges = [count * place // points for place in range(points + 1)]
    columns: dict[str, Column] = {"step": [], "value": [], "low": [], "high": []}
    for begin, end in pairwise(edges):
        chosen = values[begin:end]
        columns["step"].append(steps[end - 1])
        columns["value"].append(short(sum(chosen) / len(chosen)))
        columns["low"].append(short(min(chosen)))
        columns["high"].append(short(max(chosen)))
    return columns


def curve(
    records: Sequence[dict[str, Any]], name: str, points: int, factor: float = 1.0
) -> dict[str, Column]:
    """:func:`bucketed` of one number of the records, times ``factor``; empty where no record has it."""
    found = [(r["step"], factor * value) for r in records if (value := number(r.get(name))) is not None]
    return bucketed([step for step, _ in found], [value for _, value in found], points) if found else {}


def difference(
    records: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], name: str, points: int
) -> dict[str, Column]:
    """:func:`bucketed` of :func:`differences`; empty where they share no step."""
    found = differences(records, base, name)
    return bucketed([step for step, _ in found], [value for _, value in found], points) if found else {}


def differences(
    records: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], name: str
) -> list[tuple[int, float]]:
    """(step, ``name`` less that of ``base`` at the same step), where both have it."""
    there = {record["step"]: number(record.get(name)) for record in base}
    found = []
    for record in records:
        value, other = number(record.get(name)), there.get(record["step"])
        if value is not None and other is not None:
            found.append((record["step"], value - other))
    return found


def heat(records: Sequence[dict[str, Any]], name: str, columns: int, factor: float = 1.0) -> dict[str, Any]:
    """A list of numbers by layer over steps, averaged in at most ``columns`` buckets of records.

    Returns:
        ``x``: the edges of the buckets, steps, one more than buckets; ``y``: layers from 0; ``z``: by layer and bucket.
        Empty where no record has the list.
    """
    having = [record for record in records if record.get(name)]
    found = [(record["step"], values) for record in having if (values := numbers(record[name]))]
    if not found:
        return {}
    layers = max(len(values) for _, values in found)
    buckets = min(columns, len(found))
    edges = [len(found) * place // buckets for place in range(buckets + 1)]
    x = [found[0][0] - 1]
    z: list[list[float | None]] = [[] for _ in range(layers)]
    for begin, end in pairwise(edges):
        x.append(found[end - 1][0])
        for layer in range(layers):
            here = [
                value
                for _, values in found[begin:end]
                if layer < len(values) and (value := values[layer]) is not None
            ]
            z[layer].append(short(factor * sum(here) / len(here)) if here else None)
    return {"x": x, "y": list(range(layers)), "z": z}
