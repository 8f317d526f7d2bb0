"""SVG files that change only where their picture does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_svg(figure: Figure, path: Path) -> None:
    """Write a figure of matplotlib. The same picture gives the same bytes: no date, and no random names."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "mtraining"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
