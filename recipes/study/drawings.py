"""The figures of a study, drawn from its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from found import Row

from mtraining.report.drawing import new_figure


def draw(rows: dict[str, list[Row]], out: Path) -> None:
    """Write an SVG for each table that has rows; `UserError` where matplotlib is missing."""
    if rows["loss"]:
        _save(
            _lines(rows["loss"], [("step", "step"), ("seconds", "seconds")], "loss", "training loss"),
            out / "loss.svg",
        )
    held = [row for row in rows["held-out"] if row["from"] != "all"]
    if held:
        _save(_positions(held), out / "held-out.svg")
    if rows["copy"]:
        _save(_copy(rows["copy"]), out / "copy.svg")
    if rows["layers"]:
        _save(_layers(rows["layers"]), out / "layers.svg")
    if rows["answers"]:
        _save(_answers(rows["answers"]), out / "answers.svg")
    if rows["coverage"]:
        shown = [("step", "step")]
        figure = _lines(rows["coverage"], shown, "uncovered_run_far", "far distances never given a gradient")
        _save(figure, out / "coverage.svg")


def _lines(rows: Sequence[Row], across: Sequence[tuple[str, str]], value: str, label: str) -> Any:
    """A line for each run; a panel for each quantity ``across``, (key, label)."""
    figure = new_figure(figsize=(4.5 * len(across), 3.2))
    panels = figure.subplots(1, len(across), squeeze=False)[0]
    for axes, (key, name) in zip(panels, across, strict=True):
        for run, line in _runs(rows).items():
            axes.plot([row[key] for row in line], [row[value] for row in line], label=run)
        axes.set_xlabel(name)
        axes.set_ylabel(label)
    _legend(panels[0])
    return figure


def _positions(rows: Sequence[Row]) -> Any:
    """Held-out loss by position: at the last evaluation of each run, and before training."""
    figure = new_figure(figsize=(9, 3.4))
    before, after = figure.subplots(1, 2, sharey=True)
    for run, line in _runs(rows).items():
        for axes, step in ((before, 0), (after, max(row["step"] for row in line))):
            for read in dict.fromkeys(row["read"] for row in line):
                shown = [row for row in line if row["step"] == step and row["read"] == read]
                if shown:
                    label = f"{run}, read {read}, step {step}"
                    axes.plot(
                        [row["from"] for row in shown],
                        [row["loss"] for row in shown],
                        marker=".",
                        label=label,
                    )
    for axes, title in ((before, "before training"), (after, "at the last evaluation")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("position")
        _legend(axes)
    before.set_ylabel("held-out loss")
    return figure


def _copy(rows: Sequence[Row]) -> Any:
    figure = new_figure(figsize=(5, 3.4))
    axes = figure.subplots()
    for model, read in dict.fromkeys((row["model"], row["read"]) for row in rows):
        line = [row for row in rows if (row["model"], row["read"]) == (model, read)]
        axes.plot(
            [row["gap"] for row in line], [row["again"] for row in line], marker=".", label=f"{model}, {read}"
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens between a span and its repetition")
    axes.set_ylabel("loss of the repetition")
    _legend(axes)
    return figure


def _answers(rows: Sequence[Row]) -> Any:
    """Answers given over training, each model read by its own pattern where it has one: near, and far."""
    figure = new_figure(figsize=(9, 3.4))
    starts = sorted({row["from"] for row in rows})
    halves = starts[: len(starts) // 2], starts[len(starts) // 2 :]
    own = {row["model"] for row in rows if row["read"] == "own"}
    for axes, half in zip(figure.subplots(1, 2, sharey=True), halves, strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            read = "own" if model in own else "dense"
            sums: dict[int, tuple[float, int]] = {}
            for row in rows:
                if (row["model"], row["read"]) == (model, read) and row["from"] in half:
                    given, count = sums.get(row["step"], (0.0, 0))
                    sums[row["step"]] = given + row["given"] * row["answers"], count + row["answers"]
            line = sorted((step, given / count) for step, (given, count) in sums.items())
            if line:
                axes.plot(*zip(*line, strict=True), marker=".", label=f"{model}, read {read}")
        if half:
            axes.set_title(f"{half[0]} tokens back and more", fontsize=10)
        axes.set_xlabel("step")
    figure.axes[0].set_ylabel("answers given (%)")
    _legend(figure.axes[0])
    return figure


def _layers(rows: Sequence[Row]) -> Any:
    """Density and recall by layer, at the first and the last step that was observed."""
    figure = new_figure(figsize=(9, 3.4))
    panels = figure.subplots(1, 2)
    for axes, value in zip(panels, ("density", "recall"), strict=True):
        for run, line in _runs(rows).items():
            steps = [row["step"] for row in line]
            for step, style in ((min(steps), ":"), (max(steps), "-")):
                shown = [row for row in line if row["step"] == step and row[value] is not None]
                axes.plot(
                    [row["layer"] for row in shown],
                    [row[value] for row in shown],
                    style,
                    label=f"{run}, {step}",
                )
        axes.set_xlabel("layer")
        axes.set_ylabel(value)
        axes.set_ylim(0, 1.02)
    _legend(panels[0])
    return figure


def _runs(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row['arm']}-{row['seed']}", []).append(row)
    return found


def _legend(axes: Any) -> None:
    """Over the lines rather than beside them: with many runs it would leave no room for the axes."""
    axes.legend(fontsize=6).set_in_layout(False)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
