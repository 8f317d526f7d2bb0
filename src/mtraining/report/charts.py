"""The charts of a report, from what runs' folders hold. A chart without any data is one sentence instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from mtraining.model.key_coverage import BAND_STARTS
from mtraining.report import specs
from mtraining.report.chart import Chart, Table, grid
from mtraining.report.evaluated import evaluation_charts
from mtraining.report.runs import Run, number, numbers
from mtraining.report.series import curve, difference, heat, percents, short
from mtraining.ring.timeline import PHASES
from mtraining.train.balance import LANES

LAYOUTS = ("contiguous", "zigzag", "striped")
BANDS = ("< 1K", "1K to 4K", "4K to 32K", "> 32K")
_WORLD = 8  # ranks of the load charts, where the run itself had one
_POINTS, _CELLS = 6000, 4000  # of one chart: points of all runs, cells of one run


def build_charts(runs: Sequence[Run]) -> list[Chart]:
    """Every chart of a page, in its order. Charts without data are among them, with what is missing."""
    trained = [run for run in runs if run.steps]
    points = max(60, min(500, _POINTS // max(1, len(trained))))
    return [
        *_curves(trained, points),
        *evaluation_charts(runs, [run.name for run in trained]),
        *_layers(trained),
        *[_load(trained, layout) for layout in LAYOUTS],
        *[_timeline(trained, phase) for phase in PHASES],
        *_coverage(trained, points),
        _memory([run for run in runs if run.steps or run.about]),
    ]


def dense_run(runs: Sequence[Run]) -> Run | None:
    """The run that the others' losses are compared with: the first one with a dense pattern."""
    return next((run for run in runs if run.steps and run.pattern == "dense"), None)


def _curves(runs: Sequence[Run], points: int) -> list[Chart]:
    names = [run.name for run in runs]

    def one(name: str, title: str, says: str, unit: str, of: Callable[[Run], Table], **options: Any) -> Chart:
        axis = {key: options.pop(key) for key in ("zero", "least") if key in options}
        chart = Chart(name, title, says, specs.lines("step", unit, names, **axis), smooths=True, **options)
        _fill(chart, runs, of)
        return chart

    base = dense_run(runs)

    def to_dense(run: Run) -> Table:
        if base is None or run is base:
            return {}
        return difference(run.steps, base.steps, "loss", points)

    charts = [
        one(
            "loss", "Training loss",
            "Loss of each step, mean over the tokens of its batch. A band is the range of the steps behind a point.",
            "loss (nats a token)", lambda run: curve(run.steps, "loss", points), logs=True,
        ),
        one(
            "loss-difference", "Difference of loss to the dense run",
            f"Training loss minus that of {base.name} at the same step; below 0 is better than dense."
            if base else "Training loss minus that of a dense run.",
            "difference (nats a token)", to_dense,
        ),
        one(
            "throughput", "Throughput", "Tokens a second of each step, over all devices.",
            "tokens/s", lambda run: curve(run.steps, "tokens_per_second", points), zero=True, logs=True,
        ),
        one(
            "gradient-norm", "Gradient norm", "Norm of the gradient of all parameters before clipping.",
            "norm", lambda run: curve(run.steps, "grad_norm", points), logs=True,
        ),
        one(
            "exposed", "Exposed waits of the ring",
            "Share of the ring's time in which a rank waited for a transfer, mean over ranks.",
            "exposed (%)", lambda run: curve(run.steps, "ring_exposed_fraction", points, 100), zero=True,
        ),
        one(
            "worker-imbalance", "Imbalance over ranks",
            "Work of the busiest rank over the mean, in the layout of the run; 1 is even.",
            "max / mean", lambda run: curve(run.steps, "worker_imbalance", points), least=1.0,
        ),
        one(
            "step-imbalance", "Imbalance over ring steps",
            "Work of the busiest ring step over the mean, in the layout of the run; 1 is even.",
            "max / mean", lambda run: curve(run.steps, "step_imbalance", points), least=1.0,
        ),
    ]  # fmt: skip
    compared = charts[1]
    if base is None:
        compared.missing = ["no dense run is among these; train one with --set pattern=dense and name it too"]
    else:
        compared.missing = [m for m in compared.missing if not m.startswith(f"{base.name}:")]
    return charts


def _layers(runs: Sequence[Run]) -> list[Chart]:
    told = (
        ("density", "Density by layer", "layer_density", "Share of causal attention that was computed", "%", 100.0),
        ("recall", "Recall by layer", "layer_recall", "Share of true attention mass that was kept", "%", 100.0),
        (
            "stability", "Index stability by layer", "layer_stability",
            "Share of this step's slashes and columns that were in the step before", "%", 100.0,
        ),
        ("layer-gradient", "Gradient norm by layer", "layer_grad_norm", "Norm before clipping", "norm", 1.0),
    )  # fmt: skip
    charts = []
    for name, title, key, says, unit, factor in told:
        spec = specs.heat("step", "layer", f"{name.replace('-', ' ')} ({unit})" if unit == "%" else unit)
        chart = Chart(name, title, f"{says}, by layer over the steps of one run.", spec, menu="run")
        _fill(chart, runs, partial(_heat, runs=runs, key=key, factor=factor))
        charts.append(chart)
    spec = specs.cells("head", "layer", "recall (%)", (0, 100))
    says = "Share of true attention mass that each head kept, in the last step that measured it."
    heads = Chart("recall-heads", "Recall by layer and head", says, spec, menu="run")
    _fill(heads, runs, _recall_by_head)
    return [*charts, heads]


def _heat(run: Run, runs: Sequence[Run], key: str, factor: float) -> Table:
    records = [record for record in run.steps if isinstance(record.get(key), list)]
    layers = max((len(record[key]) for record in records), default=0)
    cells = _CELLS if len(runs) <= 5 else _CELLS // 2
    table = heat(records, key, max(20, min(160, cells // max(1, layers))), factor)
    if not table or factor != 100:
        return table
    return table | {"domain": percents(value for line in table["z"] for value in line)}


def _recall_by_head(run: Run) -> Table:
    for record in reversed(run.steps):
        heads = record.get("recall_by_head")
        if isinstance(heads, list) and heads and all(numbers(line) for line in heads):
            z = [[short(None if value is None else 100 * value) for value in numbers(line)] for line in heads]
            return grid(z)
    return {}


def _load(runs: Sequence[Run], layout: str) -> Chart:
    tables: dict[str, Table] = {}
    highest = 2.0
    for run in runs:
        entry = _entry(run, layout)
        if entry is None:
            continue
        load = [numbers(row) for row in entry["load"]]
        values = [value for row in load for value in row if value is not None]
        mean = sum(values) / len(values) or 1.0
        z = [[short(None if value is None else value / mean) for value in row] for row in load]
        tables[run.name] = grid(z)
        highest = max(highest, *(value / mean for value in values))
    spec = specs.cells("ring step", "rank", "load / mean", (0, short(highest) or 2.0))
    says = (
        f"Tiles that each rank computes in each ring step if the last measured index is laid out {layout}, "
        "over the mean of all cells. The longest cell of a column holds up all ranks."
    )
    chart = Chart(f"load-{layout}", f"Load of ranks: {layout}", says, spec, tables, menu="run")
    _tell_missing(chart, runs)
    return chart


def _entry(run: Run, layout: str) -> dict[str, Any] | None:
    """The ring of the run itself; where that was one rank, the largest one up to `_WORLD`."""
    there = {entry["world"]: entry for entry in run.balance if entry.get("layout") == layout}
    own = run.option("parallel", "cp")
    if isinstance(own, int) and own > 1 and own in there:
        return there[own]
    return there.get(max((world for world in there if 1 < world <= _WORLD), default=0))


def _timeline(runs: Sequence[Run], phase: str) -> Chart:
    """A lane a rank; where only the mean over ranks was written, that one lane."""
    says = (
        f"The {phase} pass on each rank, ring step after ring step, in the last step that was timed: computing, and "
        "waits for transfers that computing did not hide. Sums over layers; ring steps have two shades in turn."
    )
    chart = Chart(f"ring-{phase}", f"Ring timeline: {phase}", says, {}, menu="run")
    lanes = LANES if len(runs) <= 5 else LANES // 2
    _fill(chart, runs, partial(_stretches, phase=phase, lanes=lanes))
    chart.spec = specs.timeline(max((len(table["parts"]) // 2 for table in chart.tables.values()), default=0))
    return chart


def _stretches(run: Run, phase: str, lanes: int) -> Table:
    """A part for each lane and kind of time, with the ring steps as its columns."""
    parts: list[Table] = []
    chosen = list(_lanes(run, phase))
    for rank, compute, exposed in chosen[:: -(-len(chosen) // lanes) or 1]:
        now, ends = 0.0, [0.0]
        for pair in zip(compute, exposed, strict=False):
            for seconds in pair:
                now += 1000 * (seconds or 0.0)
                ends.append(short(now) or 0.0)
        for first, what in enumerate(("computing", "waiting for transfers")):
            steps = range(len(ends) // 2)
            columns = {
                "ring_step": list(steps),
                "start": [ends[2 * step + first] for step in steps],
                "end": [ends[2 * step + first + 1] for step in steps],
            }
            parts.append({"rank": rank, "what": what, **columns})
    return {"parts": parts} if parts else {}


def _lanes(run: Run, phase: str) -> Iterator[tuple[str, list[float | None], list[float | None]]]:
    """A name, and seconds computing and waiting by ring step."""
    if run.ring:
        part = run.ring[phase]
        for rank, compute, exposed in zip(run.ring["ranks"], part["compute"], part["exposed"], strict=True):
            yield f"rank {rank}", numbers(compute), numbers(exposed)
        return
    key = f"ring_{phase}_compute"
    record: dict[str, Any] = next((one for one in reversed(run.steps) if key in one), {})
    if record:
        yield "mean of ranks", numbers(record[key]), numbers(record.get(f"ring_{phase}_exposed"))


def _coverage(runs: Sequence[Run], points: int) -> list[Chart]:
    told = (
        ("coverage-step", "No gradient in a step, by distance", "uncovered_by_distance", "in that step"),
        (
            "coverage-run",
            "No gradient so far, by distance",
            "uncovered_run_by_distance",
            "in any step so far",
        ),
    )
    charts = []
    for name, title, key, when in told:
        says = (
            f"Share of key positions to which no query at that distance brought a gradient {when}; "
            "mean of layers and heads."
        )
        chart = Chart(name, title, says, {}, smooths=True)

        def bands(run: Run, key: str = key) -> Table:
            parts = []
            told = [(r["step"], numbers(r[key])) for r in run.steps if isinstance(r.get(key), list)]
            length = run.option("train", "seq_len")
            for place, band in enumerate(BANDS):
                if isinstance(length, int) and length <= BAND_STARTS[place]:
                    break  # no query is so far from a key
                records = [
                    {"step": step, "value": values[place]}
                    for step, values in told
                    if len(values) == len(BANDS)
                ]
                columns = curve(records, "value", max(20, points // len(BANDS)), 100)
                parts += [{"run": run.name, "kind": band, **columns}] if columns else []
            return {"parts": parts} if parts else {}

        _fill(chart, runs, bands)
        told_apart = [part["kind"] for table in chart.tables.values() for part in table["parts"]]
        there = [band for band in BANDS if band in told_apart]
        chart.spec = specs.lines("step", "key positions (%)", [run.name for run in runs], there, zero=True)
        charts.append(chart)
    return charts


def _memory(runs: Sequence[Run]) -> Chart:
    groups = ("predicted for a GPU", "measured on a GPU", "measured, whole process on a CPU")
    says = "Peak memory of the process that takes most, predicted from the options, and measured on the main rank."
    chart = Chart("memory", "Memory", says, specs.bars("GiB", len(runs), groups))

    def of(run: Run) -> Table:
        found = []
        predicted = run.about.get("memory_predicted")
        peak = number(predicted.get("peak")) if isinstance(predicted, dict) else None
        if peak is not None:
            found.append((groups[0], peak))
        measured = [value for r in run.steps if (value := number(r.get("memory"))) is not None]
        if measured and run.about.get("measured_on") in ("cuda", "cpu"):
            found.append((groups[1 if run.about["measured_on"] == "cuda" else 2], max(measured)))
        if not found:
            return {}
        return {"kind": [kind for kind, _ in found], "value": [short(size / 2**30) for _, size in found]}

    _fill(chart, runs, of)
    return chart


def _fill(chart: Chart, runs: Sequence[Run], of: Callable[[Run], Table]) -> None:
    """Give a chart the table of every run that has one."""
    for run in runs:
        table = of(run)
        if table:
            chart.tables[run.name] = table
    _tell_missing(chart, runs)


def _tell_missing(chart: Chart, runs: Sequence[Run]) -> None:
    lacking = [run.name for run in runs if run.name not in chart.tables]
    if lacking and len(lacking) < len(runs):
        chart.missing += [f"{name}: not measured" for name in lacking]
    elif lacking:
        chart.missing.append("measured in no run")
