"""The figures of a study, drawn from its tables. An arm has one colour in all of them, a seed one style of line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from compared import TO_DENSE
from found import DENSE, Row

from mtraining.evaluate.svg import write_svg
from mtraining.report.drawing import new_figure

SMOOTHED = 50  # windows of a smoothed line
MOST = 300  # points of a line
_SEEDS = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
_MORE_COLOURS = ("black", "gold", "navy", "salmon", "darkgreen", "tan")  # behind matplotlib's ten


def draw(rows: dict[str, list[Row]], out: Path) -> None:
    """Write an SVG for each table that has rows; `UserError` where matplotlib is missing."""
    colours = _colours(rows)
    for name, table, figure in (
        ("loss", "loss", _loss),
        ("held-out", "compared", _positions),
        ("copy", "copy", _copy),
        ("layers", "layers", _layers),
        ("answers", "answers", _answers),
        ("coverage", "coverage", _coverage),
    ):
        drawn = figure(rows[table], colours) if rows[table] else None
        path = out / f"{name}.svg"
        if drawn is None:  # one that is there is of an earlier state
            path.unlink(missing_ok=True)
        else:
            write_svg(drawn, path)


Colours = Mapping[str, Any]


def _colours(rows: Mapping[str, Sequence[Row]]) -> Colours:
    """Of each arm, in the order of the plan."""
    trained = [row["arm"] for table in ("loss", "coverage") for row in rows[table]]
    measured = [_arm(row["model"]) for table in ("compared", "copy", "answers") for row in rows[table]]
    arms = dict.fromkeys(trained + measured)
    colours = [*(f"C{number}" for number in range(10)), *_MORE_COLOURS]
    return dict(zip(arms, cycle(colours), strict=False))


def _arm(model: str) -> str:
    """Of a model such as dense-0; base, which no arm trained, stands for itself."""
    return model.rpartition("-")[0] or model


def _line(axes: Any, colours: Colours, run: str, x: Sequence[Any], y: Sequence[Any], **style: Any) -> None:
    """A line of a run, such as dense-0."""
    arm = _arm(run)
    seed = 0 if arm == run else int(run.removeprefix(f"{arm}-"))
    every = max(1, -(-len(x) // MOST))
    linestyle = _SEEDS[seed % len(_SEEDS)]
    axes.plot(x[::every], y[::every], color=colours[arm], linestyle=linestyle, label=run, **style)


def _legend(figure: Any) -> Any:
    """Below the panels, once for all of them."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(), entries, loc="outside lower center", ncols=min(4, 2 * len(figure.axes)), fontsize=8
    )
    return figure


def _panels(count: int, lines: int, **options: Any) -> tuple[Any, Sequence[Any]]:
    """A figure with so many panels beside each other and room for a legend of so many lines."""
    figure = new_figure(figsize=(4.5 * count, 3.2 + 0.2 * -(-lines // 4)))
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


def _grid(count: int) -> tuple[Any, Sequence[Any]]:
    """A figure with so many small panels, five in a row, all with the same axes."""
    columns = min(count, 5)
    lines = -(-count // columns)
    figure = new_figure(figsize=(2.2 * columns, 0.6 + 1.9 * lines))
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for empty in panels[count:]:
        empty.remove()
    return figure, panels[:count]


def _loss(rows: Sequence[Row], colours: Colours) -> Any:
    """By seconds, and less that of dense training at the same step, where the data are the same."""
    runs = _runs(rows)
    figure, (by_seconds, by_step) = _panels(2, len(runs))
    for run, line in runs.items():
        losses = smooth([row["loss"] for row in line])
        _line(by_seconds, colours, run, [row["seconds"] for row in line], losses)
        dense = {row["step"]: row["loss"] for row in runs.get(f"dense-{line[0]['seed']}", ())}
        both = [row for row in line if row["step"] in dense]
        if line[0]["arm"] != "dense" and both:
            less = smooth([row["loss"] - dense[row["step"]] for row in both])
            _line(by_step, colours, run, [row["step"] for row in both], less)
    # What comes before the model has seen anything would fill the panel.
    tail = [row["loss"] for line in runs.values() for row in line[max(1, len(line) // 20) :]]
    if tail:
        by_seconds.set_ylim(0.98 * min(tail), 1.02 * max(tail))
    by_seconds.set(xlabel="seconds of steps", ylabel="training loss")
    by_step.set(xlabel="step", ylabel="less dense training's, same data")
    by_step.axhline(0, color="grey", linewidth=0.8)
    return _legend(figure)


def smooth(values: Sequence[float]) -> list[float]:
    """Each value's mean with those before it: a fiftieth of all, or where they are few ten or a fifth of them."""
    width = max(1, min(10, len(values) // 5), len(values) // SMOOTHED)
    means = []
    for number in range(len(values)):
        window = values[max(0, number + 1 - width) : number + 1]
        means.append(sum(window) / len(window))
    return means


def _positions(rows: Sequence[Row], colours: Colours) -> Any:
    """Held-out loss of trained models by position, less that of dense training, in percent of it."""
    shown = [
        row
        for row in rows
        if row["question"] == TO_DENSE and row["measure"] == "held-out loss" and row["at"] != "all"
    ]
    if not shown:
        return None
    reads = [read for read in ("dense", "sparse", "own") if any(row["read"] == read for row in shown)]
    models = list(dict.fromkeys(row["model"] for row in shown))
    figure, panels = _panels(len(reads), len(models), sharey=True)
    for axes, read in zip(panels, reads, strict=True):
        for model in models:
            line = [row for row in shown if (row["model"], row["read"]) == (model, read)]
            if not line:
                continue
            x = [int(row["at"]) for row in line]
            _line(axes, colours, model, x, [_percent(row, "difference") for row in line], marker=".")
            low, high = ([_percent(row, end) for row in line] for end in ("low", "high"))
            axes.fill_between(x, low, high, color=colours[_arm(model)], alpha=0.08, linewidth=0)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")  # the bar
        # In proportion up to 2 %, and narrower above it: an arm that is far off shall not hide how the others differ.
        axes.set_yscale("symlog", linthresh=2, linscale=2)
        axes.set_yticks([0, 0.5, 1, 1.5, 2, 5, 10], ["0", "0.5", "1", "1.5", "2", "5", "10"])
        axes.set_title(f"read {READ[read]}", fontsize=10)
        axes.set_xlabel("from position")
    panels[0].set_ylabel("held-out loss, % above dense")
    return _legend(figure)


READ = {
    "dense": "with full attention",
    "sparse": "with the recommended pattern",
    "own": "with its own pattern",
}


def _percent(row: Row, name: str) -> float:
    return float(100 * row[name] / row["other"])


def _copy(rows: Sequence[Row], colours: Colours) -> Any:
    lines = dict.fromkeys((row["model"], row["read"]) for row in rows)
    reads = [read for read in ("dense", "sparse", "own") if any(one == read for _, one in lines)]
    figure, panels = _panels(len(reads), len(dict.fromkeys(model for model, _ in lines)), sharey=True)
    for axes, read in zip(panels, reads, strict=True):
        for model, one in lines:
            if one == read:
                line = [row for row in rows if (row["model"], row["read"]) == (model, read)]
                gaps = [row["gap"] for row in line]
                _line(axes, colours, model, gaps, [row["again"] for row in line], marker=".")
        axes.set_title(f"read {READ[read]}", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens between a span and its repetition")
    panels[0].set_ylabel("loss of the repetition")
    return _legend(figure)


def _answers(rows: Sequence[Row], colours: Colours) -> Any:
    """Answers given over training, read with full attention: a panel for each arm, with dense training behind it."""
    sums: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row["read"] == "dense":
            both = sums.setdefault(row["model"], {}).setdefault(row["step"], [0.0, 0.0])
            both[0] += row["given"] * row["answers"]
            both[1] += row["answers"]
    curves = {
        model: [(step, given / count) for step, (given, count) in sorted(found.items())]
        for model, found in sums.items()
    }
    arms = list(dict.fromkeys(_arm(model) for model in curves))
    figure, panels = _grid(len(arms))
    for axes, arm in zip(panels, arms, strict=True):
        if arm != DENSE:
            for curve in (curve for model, curve in curves.items() if _arm(model) == DENSE):
                axes.plot(*zip(*curve, strict=True), color="lightgrey")
        for model, curve in curves.items():
            if _arm(model) == arm:
                _line(axes, colours, model, *zip(*curve, strict=True))
        axes.set_title(arm, fontsize=10)
        axes.set_ylim(-2, 102)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("answers given, read densely (%)", fontsize=10)
    return figure


def _layers(rows: Sequence[Row], colours: Colours) -> Any:
    """Density and recall by layer, at the last step that was observed."""
    if all(row["density"] == 1 for row in rows):
        return None
    runs = _runs(rows)
    figure, panels = _panels(2, len(runs))
    for axes, value in zip(panels, ("density", "recall"), strict=True):
        for run, line in runs.items():
            last = max(row["step"] for row in line)
            shown = [row for row in line if row["step"] == last and row[value] is not None]
            _line(axes, colours, run, [row["layer"] for row in shown], [row[value] for row in shown])
        axes.set(xlabel="layer", ylabel=value, ylim=(0, 1.02))
    return _legend(figure)


def _coverage(rows: Sequence[Row], colours: Colours) -> Any:
    if not any(row["uncovered_run_far"] for row in rows):
        return None
    runs = _runs(rows)
    figure, (axes,) = _panels(1, 2 * len(runs))
    for run, line in runs.items():
        x, y = ([row[key] for row in line] for key in ("step", "uncovered_run_far"))
        _line(axes, colours, run, x, y)
    axes.set(xlabel="step", ylabel="far distances never given a gradient", ylim=(-0.02, 1.02))
    return _legend(figure)


def _runs(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row['arm']}-{row['seed']}", []).append(row)
    return found
