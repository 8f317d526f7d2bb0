"""One HTML file that needs nothing else: text and tables from here, charts drawn by Vega-Lite within it."""

from __future__ import annotations

import html
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mtraining.errors import UserError
from mtraining.inputs.text import replace_text
from mtraining.report.chart import Chart


@dataclass
class Section:
    """A part of a page: a heading, and below it HTML, charts, or both.

    Attributes:
        body: HTML that comes before the charts; text in it is escaped already.
        three: charts that are to be compared side by side.
    """

    name: str
    title: str
    body: str = ""
    charts: list[Chart] = field(default_factory=list)
    three: bool = False


def page(
    title: str,
    lead: str,
    sections: Sequence[Section],
    runs: Mapping[str, str] | None = None,
    smooths: bool = False,
    refresh: int = 0,
) -> str:
    """The file's text.

    Args:
        lead: HTML below the title.
        runs: colour by run, for boxes that show and hide them; none for a page of one thing.
        smooths: with a slider that smooths curves.
        refresh: seconds after which the page loads itself again; 0 for never.

    Raises:
        UserError: vl-convert, which holds the library of charts, is not installed.
    """
    drawn = [chart for section in sections for chart in section.charts if chart.tables]
    data = {"charts": [chart.packed() for chart in drawn], "refresh": refresh}
    links = " · ".join(f'<a href="#{one.name}">{_text(one.title)}</a>' for one in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the charts</a>\n'
        f'<header><h1>{_text(title)}</h1>{lead}<nav aria-label="Sections">{links}</nav></header>\n'
        f'<main id="main">\n{_controls(runs or {}, smooths)}'
        f"{''.join(_section(one) for one in sections)}</main>\n"
        f'<script type="application/json" id="data">{_json(data)}</script>\n'
        f"<script>{chart_library()}</script>\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


@lru_cache(maxsize=1)
def chart_library() -> str:
    """Vega, Vega-Lite and vega-embed as one script of 0.9 MB for a browser.

    Raises:
        UserError: vl-convert is not installed.
    """
    if importlib.util.find_spec("vl_convert") is None:
        raise UserError(
            "report: charts need vl-convert-python, which is not installed; pip install 'mtraining[report]'."
        )
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    # The end of the element, were it within a string of the script, would end the script.
    return script.replace("</script", "<\\/script")


def html_table(
    heads: Sequence[str], lines: Sequence[Sequence[Any]], caption: str, breaks: bool = True
) -> str:
    """A table whose cells are text; the first cell of a line is its heading. ``breaks``: long cells take more lines."""
    top = "".join(f'<th scope="col">{_text(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{_text(line[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in line[1:])}</tr>'
        for line in lines
    )
    return (
        f'<div class="scroll{"" if breaks else " narrow"}" tabindex="0" role="region" '
        f'aria-label="{_text(caption)}"><table>'
        f'<caption class="soft">{_text(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>'
        "</table></div>\n"
    )


def write_page(text: str, path: Path) -> None:
    """Write a page at once, so that nobody reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _json(data: Any) -> str:
    """JSON that is safe within a script element."""
    packed = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return packed.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return files("mtraining.report").joinpath("assets", name).read_text(encoding="utf-8")


def _controls(runs: Mapping[str, str], smooths: bool) -> str:
    if not runs and not smooths:
        return ""
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{_text(run)}"> '
        f'<span class="swatch" style="background:{colour}" aria-hidden="true"></span>{_text(run)}</label>'
        for run, colour in runs.items()
    )
    slider = (
        '<span class="slider"><label for="smooth">smoothing</label> '
        '<input type="range" id="smooth" min="0" max="95" step="5" value="0"> '
        '<output id="smoothed" for="smooth">0 %</output></span>'
    )
    return (
        '<div class="bar" role="group" aria-label="Controls of all charts"><fieldset><legend>Runs</legend>'
        f"{boxes}{slider if smooths else ''}</fieldset></div>\n"
    )


def _section(section: Section) -> str:
    figures = "".join(_figure(chart) for chart in section.charts if chart.tables)
    absent = [chart for chart in section.charts if not chart.tables]
    lines = "".join(
        f"<p class='soft'>{_text(chart.title)}: {_text('; '.join(chart.missing) or 'no data')}.</p>"
        for chart in absent
    )
    grid = f'<div class="grid{" three" if section.three else ""}">{figures}</div>' if figures else ""
    return (
        f'<section aria-labelledby="{section.name}"><h2 id="{section.name}">{_text(section.title)}</h2>\n'
        f"{section.body}{grid}{lines}</section>\n"
    )


def _figure(chart: Chart) -> str:
    name, title = chart.name, _text(chart.title)
    options = "".join(f'<option value="{_text(key)}">{_text(key)}</option>' for key in chart.tables)
    menu = f"<label>{_text(chart.menu)} <select>{options}</select></label>" if chart.menu else ""
    chosen = '<p class="chosen"></p>' if chart.menu else ""
    log = '<label><input type="checkbox" class="log"> log scale</label>' if chart.logs else ""
    missing = f'<p class="soft">Not shown: {_text("; ".join(chart.missing))}.</p>' if chart.missing else ""
    return (
        f'<figure id="{name}" aria-labelledby="{name}-title" aria-describedby="{name}-says">'
        f'<h3 id="{name}-title">{title}</h3><figcaption id="{name}-says">{_text(chart.says)}</figcaption>'
        f'{chosen}<div class="plot"></div>{missing}'
        f'<div class="tools" role="group" aria-label="{title}: tools">{menu}{log}'
        f'<button type="button" class="svg" aria-label="Save {title} as SVG">SVG</button>'
        f'<button type="button" class="pdf" aria-label="Print {title} or save it as PDF">PDF</button></div>'
        '<details><summary>Data</summary><div class="rows" tabindex="0" role="region" '
        f'aria-label="Data of {title}"></div></details></figure>\n'
    )
