"""One chart of a page: its title, its sentence, its specification, and its data packed for the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mtraining.report.specs import Spec

Table = dict[str, Any]


@dataclass
class Chart:
    """What a page needs to draw one chart.

    Attributes:
        name: a short name for files and links, unique on the page.
        title: a heading.
        says: one sentence: what is shown, for everybody and for screen readers.
        spec: a Vega-Lite specification without data.
        tables: packed rows by what one chooses: runs, which are drawn together, or entries of a menu.
        menu: what the menu chooses, where one table is drawn at a time; empty where all of them are.
        logs: a switch makes the axis of values logarithmic.
        smooths: the page's smoothing applies.
        missing: sentences that say what is not shown, and why.
    """

    name: str
    title: str
    says: str
    spec: Spec
    tables: dict[str, Table] = field(default_factory=dict)
    menu: str = ""
    logs: bool = False
    smooths: bool = False
    missing: list[str] = field(default_factory=list)

    def packed(self) -> dict[str, Any]:
        """As the page's script reads it."""
        return {
            "name": self.name, "title": self.title, "says": self.says, "spec": self.spec, "tables": self.tables,
            "menu": self.menu, "logs": self.logs, "smooths": self.smooths, "missing": self.missing,
        }  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """The rows that the chart first shows: of all runs, or of the first entry of its menu."""
        chosen = list(self.tables)[:1] if self.menu else list(self.tables)
        return [row for key in chosen for row in unpacked(key, self.tables[key])]


def grid(z: list[list[Any]]) -> Table:
    """The table of lines of values, both numbered from 0."""
    return {"x": list(range(len(z[0]))), "y": list(range(len(z))), "z": z}


def unpacked(key: str, table: Table) -> Iterator[dict[str, Any]]:
    """Rows of a table: of its ``parts``, of its grid ``z`` (and ``chosen``) over ``x`` and ``y``, or of
    its columns. A grid may be a triangle, with its longest line last, and say the ``domain`` of its colours."""
    if "parts" in table:
        for part in table["parts"]:
            yield from unpacked(key, part)
    elif "z" in table:
        edges = len(table["x"]) > len(table["z"][-1])
        for row, (y, line) in enumerate(zip(table["y"], table["z"], strict=True)):
            for place, value in enumerate(line):
                if value is not None:
                    more = {"x2": table["x"][place + 1]} if edges else {}
                    more |= {"chosen": table["chosen"][row][place]} if "chosen" in table else {}
                    yield {"x": table["x"][place], **more, "y": y, "value": value}
    else:
        columns = {name: column for name, column in table.items() if isinstance(column, list)}
        same = {name: value for name, value in table.items() if not isinstance(value, list)}
        for place in range(len(next(iter(columns.values()), []))):
            yield {"run": key, **same, **{name: column[place] for name, column in columns.items()}}
