"""A timed training step as a row, as a line of a table and as a bar of a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtraining.sizes import size_text, tokens_text


@dataclass(frozen=True)
class TrainRow:
    """One timed case.

    ``density`` is the index's cost, slashes and columns (1 for dense); ``step_seconds`` the median over steps of the
    slowest rank; ``peak_gib`` of the rank that took most, ``predicted_gib`` what `mtraining.predict.memory` expects.
    ``reserved_gib`` is what PyTorch took from the GPU for it. ``shortages``: how often a step found no room and gave
    memory back, the mean of the timed steps. Both are of the rank with most.
    ``dense_step_seconds`` and ``speedup`` are against the dense step of the same run with the same length, layers,
    recompute policy, fusion, offload, float8 and optimizer state. ``estimate_seconds``: the index estimates of all
    layers, measured alone. ``ring_exposed_fraction``: share of the step's ring time in which the GPU waits for keys.
    ``kept``: what ``recompute: auto`` chose that layers keep, empty for the others. ``tiles``: as
    `mtraining.kernel.measured_tiles.tiles_in_use` says.
    """

    date: str
    commit: str
    gpu: str
    gpus: int
    torch: str
    model: str
    layers: int
    seq_len: int
    density: float
    pattern: str
    layout: str
    ring: str
    recompute: str
    kept: str
    kernel: str
    fused: str
    offload: bool
    float8: str
    optimizer_state: str
    steps: int
    step_seconds: float
    tokens_per_second: float
    dense_step_seconds: float | None
    speedup: float | None
    peak_gib: float | None
    predicted_gib: float | None
    reserved_gib: float | None
    shortages: float | None
    ring_exposed_fraction: float | None
    estimate_seconds: float | None
    tiles: str


def dense_seconds(rows: Sequence[TrainRow], key: tuple[Any, ...]) -> float | None:
    """Seconds of the dense step among ``rows`` that a row of this :func:`comparable` key may be compared with."""
    found = [row.step_seconds for row in rows if row.pattern == "dense" and comparable(row) == key]
    return found[-1] if found else None


def comparable(row: Any) -> tuple[Any, ...]:
    """What two rows of one run must share before one is divided by the other. Of a row, or of a case."""
    return (
        row.seq_len,
        row.layers,
        row.recompute,
        row.fused,
        row.offload,
        row.float8,
        row.optimizer_state,
    )


def table(rows: Sequence[TrainRow]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of what a reader wants first."""
    heads = ["tokens", "layers", "density", "pattern", "layout", "ring", "recompute", "kernel", "s/step", "tokens/s",
             "dense s", "speedup", "peak memory", "predicted", "ring exposed"]  # fmt: skip

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def size(gib: float | None) -> str:
        return "" if gib is None else size_text(gib * 2**30)

    cells = [
        [
            tokens_text(row.seq_len),
            str(row.layers),
            f"{row.density:.1%}",
            row.pattern,
            row.layout,
            row.ring,
            row.recompute,
            row.kernel,
            f"{row.step_seconds:.3g}",
            f"{row.tokens_per_second:,.0f}",
            number(row.dense_step_seconds, ".3g"),
            number(row.speedup, ".2f"),
            size(row.peak_gib),
            size(row.predicted_gib),
            number(row.ring_exposed_fraction, ".1%"),
        ]
        for row in rows
    ]
    return heads, cells


def draw(rows: Sequence[TrainRow], path: Path) -> None:
    """One bar a row, seconds a step, with its gain over dense; an SVG.

    Raises:
        UserError: matplotlib is not installed.
    """
    from mtraining.evaluate.svg import write_svg
    from mtraining.report.drawing import BLUE, GREY, new_figure

    figure = new_figure(figsize=(8, 0.8 + 0.32 * len(rows)))
    axes = figure.subplots()
    labels = []
    for place, row in enumerate(rows):
        dense = row.pattern == "dense"
        axes.barh(place, row.step_seconds, color=GREY if dense else BLUE)
        gain = f"  {row.speedup:.1f}x" if row.speedup and not dense else ""
        axes.text(row.step_seconds, place, f" {row.step_seconds:.3g} s{gain}", va="center", fontsize=8)
        what = "dense" if dense else f"{row.density:.1%}"
        labels.append(f"{tokens_text(row.seq_len)}, {row.layers} layers, {what}, {row.layout} {row.ring}")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(row.step_seconds for row in rows))  # room for the numbers
    axes.set_xlabel("seconds a training step")
    first = rows[0]
    axes.set_title(f"{first.model}, {first.gpus} x {first.gpu}, commit {first.commit}", fontsize=9)
    write_svg(figure, path)
