"""`mtraining inspect`: the page about the attention of one text."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

from mtraining.evaluate.inspect import Inspection
from mtraining.report import specs
from mtraining.report.chart import Chart, grid
from mtraining.report.page import Section, html_table, page
from mtraining.report.series import percents, short

# Of all maps. With the script of charts, and numbers of every head, a page stays below 5 MB.
_MAP_BYTES, _CELL_BYTES, _EDGE_BYTES = 3_300_000, 11, 9
_WORST, _SHOWN = 20, 40  # heads of the table, missed pairs of the page
_CONTEXT = 12  # tokens on either side

Decode = Callable[[Sequence[int]], str]


def attention_page(
    found: Inspection, ids: Sequence[int], decode: Decode, model: str, text: str, attention: str
) -> str:
    """The page's text.

    Args:
        ids: the tokens of the text.
        decode: turns tokens into text.
        model, text, attention: what they are called.
    """
    recall, density = found.means()
    lead = (
        f"<p>Exact attention of {html.escape(model)} on {html.escape(text)}, beside what pattern "
        f"{html.escape(attention)} computes of it: {found.tokens:,} tokens, {len(found.rows)} of them as queries. "
        f"The pattern keeps {recall:.1%} of the attention mass (recall) with "
        f"{density:.1%} of the pairs of tokens (density), means over layers and heads.</p>"
    )
    if found.windows:
        kinds: dict[str, list[str]] = {}
        for layer, window in found.windows.items():
            kinds.setdefault(window, []).append(str(layer))
        which = "; ".join(f"{window} in layers {', '.join(layers)}" for window, layers in kinds.items())
        lead += (
            f"<p>The model has {html.escape(which)}. Such a layer is computed whole, and no pattern chooses there; the "
            "means leave it out. Its density is a share of all causal tiles.</p>"
        )
    sections = [
        Section(
            "heads", "Heads", charts=[_by_head(found, "recall"), _by_head(found, "density"), _against(found)]
        ),
        Section("distance-section", "Distance", charts=[_distance(found)]),
        Section("map-section", "Maps", charts=[_maps(found)]),
        Section("worst", "Worst heads", _worst(found)),
        Section("misses", "What the pattern misses", _missed(found, ids, decode)),
    ]
    return page(f"Attention of {model} on {text}", lead, sections)


def _by_head(found: Inspection, name: str) -> Chart:
    shares = found.recall if name == "recall" else found.density
    what = (
        "of a row's attention mass that the pattern keeps"
        if name == "recall"
        else "of causal attention computed"
    )
    table = grid([[short(100 * value) for value in line] for line in shares.tolist()])
    low, high = percents(value for line in table["z"] for value in line)
    spec = specs.cells("head", "layer", f"{name} (%)", (0, 100) if name == "recall" else (low, high))
    return Chart(
        f"{name}-heads", f"{name.capitalize()} by head", f"Share {what}.", spec, {"all heads": table}
    )


def _against(found: Inspection) -> Chart:
    layers, heads = found.recall.shape
    table: dict[str, list[Any]] = {
        "layer": [layer for layer in range(layers) for _ in range(heads)],
        "head": list(range(heads)) * layers,
        "density": [short(100 * value) for value in found.density.flatten().tolist()],
        "value": [short(100 * value) for value in found.recall.flatten().tolist()],
    }
    says = (
        "Each point is a head. The lower it is, the more attention the pattern loses; the further right, the more it "
        "computes."
    )
    spec = specs.heads(percents(table["density"]), percents(table["value"]))
    return Chart("against", "Recall against density", says, spec, {"all heads": table})


def _distance(found: Inspection) -> Chart:
    names = [_band(found.distances, place) for place in range(len(found.distances))]
    spec = specs.distances(names)
    says = "Share of a row's attention mass by the distance of its keys, and what the pattern keeps of it."
    chart = Chart("distance", "Mass by distance", says, spec, menu="of")
    everything = (found.mass.mean((0, 1)), found.kept.mean((0, 1)))
    by_layer = {
        f"layer {n}": (found.mass[n].mean(0), found.kept[n].mean(0)) for n in range(found.mass.shape[0])
    }
    for key, (mass, kept) in {"all layers": everything, **by_layer}.items():
        table: dict[str, list[object]] = {"x": [], "kind": [], "value": []}
        for place, name in enumerate(names):
            for kind, value in (("kept", kept[place]), ("missed", mass[place] - kept[place])):
                table["x"].append(name)
                table["kind"].append(kind)
                table["value"].append(short(100 * max(0.0, value.item())))
        chart.tables[key] = table
    return chart


def _band(edges: Sequence[int], place: int) -> str:
    end = edges[place + 1] - 1 if place + 1 < len(edges) else None
    if end is None:
        return f"{edges[place]}+"
    return str(edges[place]) if end == edges[place] else f"{edges[place]}-{end}"


def _maps(found: Inspection) -> Chart:
    _, heads, side, _ = found.maps.shape
    says = (
        "Mean attention mass of a query row in each cell of keys, as colour. A square shows the share of the cell that "
        "the pattern computes. Queries go down, keys to the right, from the first token."
    )
    chart = Chart("map", "Map of a head", says, specs.attention_map(), menu="head")
    edges = [place * found.tokens // side for place in range(side)]
    order = found.recall.flatten().argsort().tolist()
    one = side * (side + 1) // 2 * _CELL_BYTES + 2 * side * _EDGE_BYTES + 100
    shown = order[: _MAP_BYTES // one]
    if len(shown) < len(order):
        chart.missing.append(
            f"{len(order) - len(shown):,} heads with higher recall, for a page would be too large"
        )
    for place in shown:  # the worst first
        layer, head = divmod(place, heads)
        mass, chosen = found.maps[layer, head].tolist(), found.chosen[layer, head].tolist()
        table = {
            "x": edges,
            "y": edges,
            "z": [[_short_share(mass[q][k]) for k in range(q + 1)] for q in range(side)],
            "chosen": [[round(100 * chosen[q][k]) for k in range(q + 1)] for q in range(side)],
        }
        chart.tables[f"layer {layer}, head {head}: recall {found.recall[layer, head]:.1%}"] = table
    return chart


def _short_share(share: float) -> float:
    """In percent, to two digits, and no more than three decimals: so much can be seen."""
    return round(float(f"{100 * share:.2g}"), 3)


def _worst(found: Inspection) -> str:
    heads = found.recall.shape[1]
    lines = []
    for place in found.recall.flatten().argsort()[:_WORST].tolist():
        layer, head = divmod(place, heads)
        lost = found.mass[layer, head] - found.kept[layer, head]
        worst = int(lost.argmax())
        lines.append(
            [
                f"layer {layer}, head {head}",
                f"{found.recall[layer, head]:.1%}",
                f"{found.density[layer, head]:.1%}",
                f"{_band(found.distances, worst)} tokens: {lost[worst]:.1%}",
            ]
        )
    return html_table(["head", "recall", "density", "most is lost at"], lines, "Heads with the lowest recall")


def _missed(found: Inspection, ids: Sequence[int], decode: Decode) -> str:
    if not found.misses:
        return "<p>Nothing: the pattern keeps every pair that was looked at.</p>"
    worst = sorted(found.misses, key=lambda miss: -miss.mass)[:_SHOWN]
    lines = "".join(
        f'<tr><th scope="row">layer {miss.layer}, head {miss.head}</th><td>{miss.mass:.1%}</td>'
        f"<td>{miss.query - miss.key:,}</td><td class='tokens'>{_context(ids, miss.query, decode)}</td>"
        f"<td class='tokens'>{_context(ids, miss.key, decode)}</td></tr>"
        for miss in worst
    )
    heads = "".join(
        f'<th scope="col">{head}</th>'
        for head in ("head", "share of the row", "distance (tokens)", "the query", "the key that it misses")
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Missed pairs"><table>'
        '<caption class="soft">Pairs with most attention that the pattern leaves out, and the text around them'
        f"</caption><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _context(ids: Sequence[int], place: int, decode: Decode) -> str:
    """The text around a token, with the token marked."""
    before = decode(ids[max(0, place - _CONTEXT) : place])
    after = decode(ids[place + 1 : place + 1 + _CONTEXT])
    return (
        f"{html.escape(before)}<mark>{html.escape(decode(ids[place : place + 1]))}</mark>{html.escape(after)}"
    )
