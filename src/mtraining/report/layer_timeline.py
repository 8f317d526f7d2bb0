"""A picture of one layer's attention on one rank: what is computed, what travels meanwhile, and what is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mtraining.evaluate.svg import write_svg
from mtraining.predict.ring import Simulated, Span
from mtraining.predict.step_time import StepTime
from mtraining.report.drawing import BLUE, GREEN, ORANGE, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LANES = ("compute", "wait", "intra", "inter")
_NAMES = {"compute": "kernels", "wait": "waiting", "intra": "inside the node", "inter": "to the next node"}
_COLOURS = {"compute": BLUE, "wait": ORANGE, "intra": GREEN, "inter": "#8c5fa8"}


def write_timeline(time: StepTime, path: Path) -> None:
    """Write the picture of a predicted step's layer as an SVG file.

    Raises:
        UserError: matplotlib is not installed.
    """
    figure = timeline_figure({"forward": time.forward, "backward": time.backward})
    write_svg(figure, path)


def timeline_figure(passes: dict[str, Simulated]) -> Figure:
    """One panel a pass, one lane for computing, for waiting and for each link, in milliseconds."""
    figure = new_figure(figsize=(9, 1.9 * len(passes)))
    panels = figure.subplots(len(passes), 1, squeeze=False)[:, 0]
    for axes, (name, simulated) in zip(panels, passes.items(), strict=True):
        draw_spans(axes, simulated.spans)
        axes.set_title(
            f"{name}: {1000 * simulated.seconds:.2f} ms, ranks wait {simulated.exposed_fraction:.1%}",
            fontsize=10,
        )
    panels[-1].set_xlabel("milliseconds since the pass began, last rank")
    return figure


def draw_spans(axes: Axes, spans: list[Span]) -> None:
    """The spans of one rank, each lane a row."""
    lanes = [lane for lane in LANES if any(span.lane == lane for span in spans)]
    for row, lane in enumerate(reversed(lanes)):
        bars = [
            (1000 * s.begin, 1000 * (s.end - s.begin)) for s in spans if s.lane == lane and s.end > s.begin
        ]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=_COLOURS[lane], edgecolor="white", linewidth=0.4)
    axes.set_yticks(range(len(lanes)), [_NAMES[lane] for lane in reversed(lanes)])
    axes.margins(x=0.01)
