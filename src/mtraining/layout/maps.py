"""The table of layouts. A new layout is one file and one entry here."""

from __future__ import annotations

from mtraining.errors import UserError, did_you_mean
from mtraining.layout.base import Layout
from mtraining.layout.contiguous import Contiguous
from mtraining.layout.striped import Striped
from mtraining.layout.zigzag import Zigzag

LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (Contiguous, Zigzag, Striped)}


def build_layout(name: str, unit: int = 128) -> Layout:
    """The layout called ``name``; ``unit`` is the stripe in tokens of the striped layout.

    Raises:
        UserError: unknown name, or a unit below one.
    """
    if name not in LAYOUTS:
        hint = did_you_mean(name, LAYOUTS)
        raise UserError(f"layout: {name!r} is not known{hint}; choose one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[name](unit=unit)
