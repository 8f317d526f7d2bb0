"""Charts as Vega-Lite specifications, without their data.

A specification is a mapping that the page hands to Vega-Lite in the browser, and vl-convert to Vega-Lite on paper. Its
data has a row a mark: `series.py` and `charts.py` say with which fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Spec = dict[str, Any]

HEIGHT = 260
# Told apart with any colour vision for the first eight (Okabe and Ito); later runs are dashed as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
# Symbols would have the opacity of the bands behind the curves.
_LEGEND = {
    "orient": "bottom", "columns": 2, "labelLimit": 150, "symbolType": "stroke", "symbolOpacity": 1,
    "symbolStrokeWidth": 2,
}  # fmt: skip
DASHES = ([1, 0], [6, 3], [2, 2])
KINDS = ([1, 0], [8, 4], [2, 3], [12, 4, 2, 4], [4, 2], [1, 6])


def colour_of(number: int) -> str:
    """The colour of a run by its place."""
    return COLOURS[number % len(COLOURS)]


def _by_run(runs: Sequence[str], kinds: Sequence[str]) -> tuple[Spec, Spec]:
    """Encodings of all marks, which tell runs apart by colour, and of lines, by dashes for kinds or rounds of
    colours."""
    dashed: Spec = {}
    channels: Spec = {
        "color": {
            "field": "run",
            "type": "nominal",
            "title": None,
            "scale": {"domain": list(runs), "range": [colour_of(place) for place in range(len(runs))]},
            "legend": _LEGEND if len(runs) > 1 else None,
        },
        "detail": [{"field": "run"}],
    }
    if len(kinds) > 1:
        dashed["strokeDash"] = {
            "field": "kind",
            "type": "nominal",
            "title": None,
            "scale": {"domain": list(kinds), "range": [KINDS[n % len(KINDS)] for n in range(len(kinds))]},
            "legend": _LEGEND | {"symbolStrokeColor": "#7f7f7f"},
        }
        channels["detail"].append({"field": "kind"})
    elif len(runs) > len(COLOURS):
        dashes = [DASHES[place // len(COLOURS) % len(DASHES)] for place in range(len(runs))]
        dashed["strokeDash"] = {
            "field": "run", "scale": {"domain": list(runs), "range": dashes}, "legend": None,
        }  # fmt: skip
    return channels, dashed


def _widths(runs: Sequence[str]) -> Spec:
    """The first curve is the widest and drawn first, so that it shows where the others lie on it."""
    if not 1 < len(runs) <= len(COLOURS):
        return {"value": 1.8}
    return {"condition": {"test": {"field": "run", "equal": runs[0]}, "value": 3.6}, "value": 1.7}


def lines(
    x: str,
    y: str,
    runs: Sequence[str],
    kinds: Sequence[str] = (),
    x_field: str = "step",
    zero: bool = False,
    least: float | None = None,
) -> Spec:
    """Curves by run: rows with ``run``, ``x_field``, ``value``, and ``low``, ``high`` of what a point stands for.

    Args:
        x, y: titles of the axes, with units.
        kinds: what a run's several curves are called, in rows' ``kind``.
        zero: the axis of ``y`` begins at 0.
        least: the axis of ``y`` begins here. What never changes would have no axis otherwise.
    """
    scale = {"zero": zero} if least is None else {"zero": False, "domainMin": least}
    value = {"field": "value", "type": "quantitative", "title": y, "scale": scale}
    shown = [
        {"field": "run", "title": "run"},
        {"field": x_field, "type": "quantitative", "title": x, "format": ",.6~g"},
        {"field": "value", "type": "quantitative", "title": y, "format": ",.5~g"},
    ]
    shown += [{"field": "kind", "title": "of"}] if len(kinds) > 1 else []
    ends = [
        {"field": name, "type": "quantitative", "title": title, "format": ",.5~g"}
        for name, title in (("low", "least of its steps"), ("high", "greatest of its steps"))
    ]
    near = {
        "name": "near",
        "select": {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"},
    }
    channels, dashed = _by_run(runs, kinds)
    return {
        "height": HEIGHT,
        "encoding": {"x": {"field": x_field, "type": "quantitative", "title": x}, **channels},
        "layer": [
            {
                "name": "band",  # the page leaves it out where no point stands for several steps
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "area", "opacity": 0.18, "aria": False},
                "encoding": {"y": value | {"field": "low"}, "y2": {"field": "high"}},
            },
            {
                "mark": {"type": "line", "aria": False, "point": False},
                "encoding": {"y": value, "strokeWidth": _widths(runs), **dashed},
            },
            {
                "params": [near],
                "mark": {"type": "point", "filled": True, "size": 45, "aria": False},
                "encoding": {
                    "y": value,
                    "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
                    "tooltip": [*shown, *ends],
                },
            },
        ],
    }


def heat(x: str, y: str, value: str, domain: tuple[float, float] | None = None) -> Spec:
    """Cells over steps: rows with ``x``, ``x2`` (edges), ``y`` and ``value``."""
    return _cells(
        {
            "x": {"field": "x", "type": "quantitative", "title": x, "scale": {"nice": False, "zero": False}},
            "x2": {"field": "x2"},
        },
        [{"field": "x2", "title": x, "format": ",d"}],
        y,
        value,
        domain,
    )


def cells(
    x: str, y: str, value: str, domain: tuple[float, float] | None = None, scheme: str = "viridis"
) -> Spec:
    """Cells in a table: rows with ``x``, ``y`` and ``value``."""
    axis = {"labelOverlap": "greedy", "labelAngle": 0}
    return _cells(
        {"x": {"field": "x", "type": "ordinal", "title": x, "axis": axis, "sort": None}},
        [{"field": "x", "title": x}],
        y,
        value,
        domain,
        scheme,
    )


def _cells(
    x: Spec,
    told: list[Spec],
    y: str,
    value: str,
    domain: tuple[float, float] | None,
    scheme: str = "viridis",
) -> Spec:
    scale: Spec = {"scheme": scheme}
    if domain is not None:
        scale |= {"domain": list(domain), "clamp": True}
    legend = {"orient": "top", "gradientLength": 180, "gradientThickness": 10}
    return {
        "height": HEIGHT,
        "mark": {"type": "rect", "aria": False},
        "encoding": {
            **x,
            "y": {"field": "y", "type": "ordinal", "title": y, "axis": {"labelOverlap": "greedy"}, "sort": None},
            "color": {
                "field": "value", "type": "quantitative", "title": value, "scale": scale, "legend": legend,
            },
            "tooltip": [
                *told,
                {"field": "y", "title": y},
                {"field": "value", "type": "quantitative", "title": value, "format": ",.4~g"},
            ],
        },
    }  # fmt: skip


def timeline(lanes: int) -> Spec:
    """Stretches of time: rows with ``rank`` (one of so many), ``ring_step``, ``what``, ``start`` and ``end`` in ms."""
    return {
        "height": 20 * max(2, lanes),
        "transform": [{"calculate": "datum.end - datum.start", "as": "duration"}],
        "mark": {"type": "bar", "aria": False, "height": {"band": 0.8}},
        "encoding": {
            "x": {"field": "start", "type": "quantitative", "title": "time since the pass began (ms)"},
            "x2": {"field": "end"},
            "y": {"field": "rank", "type": "nominal", "title": None, "sort": None},
            # Lines between ring steps would hide the short ones.
            "opacity": {"condition": {"test": "datum.ring_step % 2 == 1", "value": 0.72}, "value": 1},
            "color": {
                "field": "what",
                "type": "nominal",
                "title": None,
                "scale": {
                    "domain": ["computing", "waiting for transfers"],
                    "range": [COLOURS[0], COLOURS[1]],
                },
                "legend": {"orient": "top"},
            },
            "tooltip": [
                {"field": "rank", "title": "on"},
                {"field": "ring_step", "title": "ring step"},
                {"field": "what", "title": "what"},
                {"field": "duration", "type": "quantitative", "title": "ms", "format": ",.4~g"},
            ],
        },
    }


def bars(x: str, runs: int, groups: Sequence[str]) -> Spec:
    """Bars by run: rows with ``run``, ``kind`` (one of ``groups``) and ``value``."""
    return {
        "height": 40 + 14 * len(groups) * runs,
        "mark": {"type": "bar", "aria": False},
        "encoding": {
            "y": {
                "field": "run",
                "type": "nominal",
                "title": None,
                "sort": None,
                "axis": {"labelLimit": 140},
            },
            "yOffset": {"field": "kind", "sort": list(groups)},
            "x": {"field": "value", "type": "quantitative", "title": x, "scale": {"zero": True}},
            "color": {
                "field": "kind",
                "type": "nominal",
                "title": None,
                "scale": {"domain": list(groups), "range": list(COLOURS[: len(groups)])},
                "legend": {"orient": "top", "columns": 1, "labelLimit": 0},
            },
            "tooltip": [
                {"field": "run", "title": "run"},
                {"field": "kind", "title": "of"},
                {"field": "value", "type": "quantitative", "title": x, "format": ",.4~g"},
            ],
        },
    }


def heads(density: Sequence[float], recall: Sequence[float]) -> Spec:
    """A point a head: rows with ``layer``, ``head``, ``density`` and ``value`` (recall), in percent.

    Args:
        density, recall: ends of the two axes.
    """
    percent = {"type": "quantitative"}
    return {
        "height": HEIGHT,
        "mark": {"type": "point", "filled": True, "size": 40, "aria": False},
        "encoding": {
            "x": {"field": "density", "title": "density (%)", "scale": {"domain": list(density)}, **percent},
            "y": {"field": "value", "title": "recall (%)", "scale": {"domain": list(recall)}, **percent},
            "color": {
                "field": "layer", "type": "quantitative", "scale": {"scheme": "viridis"},
                "legend": {"orient": "top", "gradientLength": 180, "gradientThickness": 10},
            },
            "tooltip": [
                {"field": "layer"},
                {"field": "head"},
                {"field": "density", "type": "quantitative", "title": "density (%)", "format": ",.4~g"},
                {"field": "value", "type": "quantitative", "title": "recall (%)", "format": ",.4~g"},
            ],
        },
    }  # fmt: skip


def distances(bands: Sequence[str]) -> Spec:
    """Stacked bars by distance: rows with ``x`` (a band), ``kind`` (kept or missed) and ``value`` in percent."""
    return {
        "height": HEIGHT,
        "mark": {"type": "bar", "aria": False},
        "encoding": {
            "x": {
                "field": "x", "type": "ordinal", "title": "distance (tokens)", "sort": list(bands),
                "axis": {"labelAngle": -45},
            },
            "y": {"field": "value", "type": "quantitative", "title": "mass (%)"},
            "color": {
                "field": "kind", "type": "nominal", "title": None, "legend": {"orient": "top"},
                "scale": {"domain": ["kept", "missed"], "range": [COLOURS[0], COLOURS[1]]},
            },
            "tooltip": [
                {"field": "x", "title": "distance"},
                {"field": "kind", "title": "of"},
                {"field": "value", "type": "quantitative", "title": "mass (%)", "format": ",.3~g"},
            ],
        },
    }  # fmt: skip


def attention_map() -> Spec:
    """Cells of keys and queries: rows with ``x``, ``y``, ``value`` (mass) and ``chosen``, both in percent."""
    axis = {"labelOverlap": "greedy", "labelAngle": 0}
    return {
        "height": 420,
        "encoding": {
            "x": {"field": "x", "type": "ordinal", "title": "key (token)", "axis": axis},
            "y": {"field": "y", "type": "ordinal", "title": "query (token)", "axis": {"labelOverlap": "greedy"}},
            "tooltip": [
                {"field": "y", "title": "queries from"},
                {"field": "x", "title": "keys from"},
                {"field": "value", "type": "quantitative", "title": "mass of a row (%)"},
                {"field": "chosen", "type": "quantitative", "title": "computed (%)"},
            ],
        },
        "layer": [
            {
                "mark": {"type": "rect", "aria": False},
                "encoding": {
                    "color": {
                        "field": "value", "type": "quantitative", "title": "mass of a row (%)",
                        "scale": {"scheme": "viridis", "type": "symlog", "constant": 0.1},
                        "legend": {"orient": "top", "gradientLength": 180, "gradientThickness": 10},
                    }
                },
            },
            {
                "transform": [{"filter": "datum.chosen > 0"}],
                "mark": {
                    "type": "point", "shape": "square", "filled": False, "stroke": COLOURS[1], "strokeWidth": 1,
                    "opacity": 0.8, "aria": False,
                },
                "encoding": {
                    "size": {
                        "field": "chosen", "type": "quantitative", "title": "computed (%)",
                        "scale": {"domain": [0, 100], "range": [4, 45]}, "legend": None,
                    }
                },
            },
        ],
    }  # fmt: skip
