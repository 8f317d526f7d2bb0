"""Figures that need no display, drawn with matplotlib: for files beside other output, not for pages."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from mtraining.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


BLUE, GREY, ORANGE, GREEN = "#2a6fbb", "#8c8c8c", "#d9822b", "#3a9a5c"


def new_figure(**options: Any) -> Figure:
    """A figure that needs no display.

    Raises:
        UserError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "report: drawing needs matplotlib, which is not installed; pip install 'mtraining[report]'."
        )
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)
