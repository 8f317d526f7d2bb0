"""The needle's heat map: length across, depth down, the share of needles that were found as colour."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtraining.errors import UserError
from mtraining.evaluate.results import Key
from mtraining.evaluate.svg import write_svg
from mtraining.sizes import tokens_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def needle_grids(
    lines: Iterable[tuple[Key, dict[str, Any]]],
) -> dict[tuple[str, str, str], dict[tuple[int, float], float]]:
    """Mean score at each (length, depth), for each (model, attention, task) of the needle suite."""
    found: dict[tuple[str, str, str], dict[tuple[int, float], list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for key, record in lines:
        if key.suite == "needle":
            place = key.length, float(record["details"]["depth"])
            found[key.model, key.attention, key.task][place].append(record["score"])
    return {
        name: {place: sum(scores) / len(scores) for place, scores in grid.items()}
        for name, grid in found.items()
    }


def draw_needles(grid: dict[tuple[int, float], float], title: str, path: Path) -> None:
    """Write one grid as SVG.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        write_svg(needle_figure(grid, title), path)
    except ImportError:
        raise UserError(
            "the heat map needs matplotlib; install mtraining[report], or use --no-chart."
        ) from None


def needle_figure(grid: dict[tuple[int, float], float], title: str) -> Figure:
    """A grid of `needle_grids`: a cell for each length and depth, with the share of needles found."""
    from matplotlib.figure import Figure

    lengths = sorted({length for length, _ in grid})
    depths = sorted({depth for _, depth in grid})
    values = [[grid.get((length, depth), float("nan")) for length in lengths] for depth in depths]
    figure = Figure(figsize=(1.6 + 0.7 * len(lengths), 1.4 + 0.35 * len(depths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [tokens_text(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth of the needle", title=title)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            if not isnan(value):
                axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=axes, label="found")
    return figure
