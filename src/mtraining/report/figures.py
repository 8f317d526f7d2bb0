"""Charts as files for a paper, drawn without a browser."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

from mtraining.errors import UserError
from mtraining.report.chart import Chart
from mtraining.report.specs import Spec

_WIDTH = 480


def filled(chart: Chart) -> Spec:
    """The specification of a chart as it first shows, with its data, at a fixed width."""
    spec = deepcopy(chart.spec)
    rows = chart.rows()
    domain = next(iter(chart.tables.values()), {}).get("domain") if chart.menu else None
    if domain:
        spec["encoding"]["color"]["scale"] |= {"domain": domain, "clamp": True}
    if "layer" in spec:  # points that only a pointer shows
        ranges = any(row.get("low") is not None for row in rows)
        spec["layer"] = [
            layer
            for layer in spec["layer"]
            if "params" not in layer and (ranges or layer.get("name") != "band")
        ]
    return spec | {"width": _WIDTH, "data": {"values": rows}, "config": {"view": {"stroke": None}}}


def write_figures(charts: Sequence[Chart], folder: Path) -> list[Path]:
    """Write every chart that has data as SVG and as PDF.

    Raises:
        UserError: vl-convert is not installed.
    """
    if importlib.util.find_spec("vl_convert") is None:
        raise UserError(
            "report: figures need vl-convert-python, which is not installed; pip install 'mtraining[report]'."
        )
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for chart in charts:
        if chart.tables:
            svg = vl_convert.vegalite_to_svg(filled(chart))
            for path, content in (
                (folder / f"{chart.name}.svg", svg.encode()),
                (folder / f"{chart.name}.pdf", vl_convert.svg_to_pdf(svg)),
            ):
                path.write_bytes(content)
                written.append(path)
    return written
