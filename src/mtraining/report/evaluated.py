"""Charts and tables of what was evaluated: while runs trained, and by `mtraining evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtraining.evaluate.heatmap import needle_grids
from mtraining.evaluate.summary import summarise, table
from mtraining.report import specs
from mtraining.report.chart import Chart, Table
from mtraining.report.runs import Run, number, numbers
from mtraining.report.series import short
from mtraining.sizes import tokens_text

_POINTS = 10_000  # of a chart over steps, in all its curves


def evaluation_charts(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """Held-out loss over steps and by position, scores while training, and needles by length and depth."""
    return [_held_out(runs, names), _by_position(runs, names), _suites(runs, names), _needles(runs)]


def _rows(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    rows = record.get(name)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _over_steps(run: Run, rows: str, value: str, told_apart: Sequence[str]) -> dict[str, Table]:
    """Columns ``step`` and ``value`` by what tells a run's curves apart."""
    found: dict[str, Table] = {}
    for record in run.evaluations:
        for row in _rows(record, rows):
            score = number(row.get(value))
            if score is None:
                continue
            kind = ", ".join(_named(row.get(part)) for part in told_apart)
            columns = found.setdefault(kind, {"run": run.name, "kind": kind, "step": [], "value": []})
            columns["step"].append(record["step"])
            columns["value"].append(short(score))
    return found


def _named(value: Any) -> str:
    return f"{tokens_text(value)} tokens" if isinstance(value, int) else str(value)


def _chart(
    name: str, title: str, says: str, y: str, names: Sequence[str], found: dict[str, dict[str, Table]]
) -> Chart:
    kinds = list(dict.fromkeys(kind for tables in found.values() for kind in tables))
    chart = Chart(name, title, says, specs.lines("step", y, names, kinds))
    points = sum(len(table["step"]) for tables in found.values() for table in tables.values())
    every = -(-points // _POINTS) or 1
    chart.tables = {
        run: {"parts": [_thinned(table, every) for table in tables.values()]}
        for run, tables in found.items()
        if tables
    }
    _say_missing(chart, names)
    if every > 1:
        chart.missing.append(f"{every - 1} of {every} evaluations, for there are {points:,} points")
    return chart


def _thinned(table: Table, every: int) -> Table:
    """Every so many points of a curve, and its last one."""
    first = (len(table["step"]) - 1) % every
    return table | {name: table[name][first::every] for name in ("step", "value")}


def _say_missing(chart: Chart, names: Sequence[str]) -> None:
    lacking = [name for name in names if name not in chart.tables]
    if not chart.tables:
        chart.missing = ["no run was evaluated so; the section evaluate: of a configuration asks for it"]
    else:
        chart.missing = [f"{name}: not evaluated" for name in lacking]


def _held_out(runs: Sequence[Run], names: Sequence[str]) -> Chart:
    found = {run.name: _over_steps(run, "held_out", "loss", ("attention", "length")) for run in runs}
    says = (
        "Loss of held-out text over steps, by how it was read (train: the run's own pattern) and by length."
    )
    chart = _chart("held-out", "Held-out loss", says, "held-out loss (nats a token)", names, found)
    chart.logs = True
    return chart


def _suites(runs: Sequence[Run], names: Sequence[str]) -> Chart:
    found = {run.name: _over_steps(run, "suites", "score", ("task", "attention", "length")) for run in runs}
    says = "Score of questions asked while training, by task, attention and length."
    return _chart("suites", "Scores while training", says, "score (%)", names, found)


def _by_position(runs: Sequence[Run], names: Sequence[str]) -> Chart:
    """At each run's last evaluation, by attention, at the longest length that it measured."""
    tables: dict[str, Table] = {}
    for run in runs:
        record = next((one for one in reversed(run.evaluations) if _rows(one, "held_out")), None)
        parts = []
        for row in _rows(record, "held_out") if record else ():
            width, losses = number(row.get("bucket")), numbers(row.get("by_position"))
            if width and losses:
                parts.append(
                    {
                        "run": run.name,
                        "kind": f"{row.get('attention')}, {_named(row.get('length'))}",
                        "position": [short(width * (place + 0.5)) for place in range(len(losses))],
                        "value": [short(loss) for loss in losses],
                    }
                )
        if parts:
            tables[run.name] = {"parts": parts}
    kinds = list(dict.fromkeys(part["kind"] for entry in tables.values() for part in entry["parts"]))
    says = (
        "Loss of held-out text by the position of a token, at each run's last evaluation. Points are middles of "
        "buckets."
    )
    spec = specs.lines("position (tokens)", "held-out loss (nats a token)", names, kinds, x_field="position")
    chart = Chart("by-position", "Held-out loss by position", says, spec, tables)
    _say_missing(chart, names)
    return chart


def _needles(runs: Sequence[Run]) -> Chart:
    spec = specs.cells("tokens", "depth", "found (%)", (0, 100))
    says = "Share of needles that were found, by length of the text and depth of the needle in it."
    chart = Chart("needles", "Needles by length and depth", says, spec, menu="of")
    for run in runs:
        for (model, attention, task), grid in needle_grids(run.scores).items():
            lengths, depths = sorted({length for length, _ in grid}), sorted({depth for _, depth in grid})
            z = [[_percent(grid.get((length, depth))) for length in lengths] for depth in depths]
            chart.tables[f"{run.name}: {model}, {attention}, {task}"] = {
                "x": [tokens_text(length) for length in lengths],
                "y": [f"{depth:.0%}" for depth in depths],
                "z": z,
            }
    if not chart.tables:
        chart.missing = [
            "no results of mtraining evaluate with needles; put them in a folder of the run, or name their folder"
        ]
    return chart


def _percent(share: float | None) -> float | None:
    return None if share is None else short(100 * share)


def score_table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of the scores of `mtraining evaluate`, in all runs; both empty where there are none."""
    rows = [
        row | {"model": f"{run.name}: {row['model']}"}
        for run in runs
        if run.scores
        for row in summarise(run.scores)
    ]
    return table(rows) if rows else ([], [])
