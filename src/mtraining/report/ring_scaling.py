"""Pictures of what a ring does on clusters of growing size, simulated from measured kernel rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from mtraining.layout import build_layout
from mtraining.predict.measured import Link, rates_of
from mtraining.predict.plan import prescribed_pattern
from mtraining.predict.ring import Network, Simulated
from mtraining.predict.step_time import attention_passes
from mtraining.predict.work import Index, LayerWork
from mtraining.report.drawing import BLUE, GREEN, GREY, ORANGE, new_figure
from mtraining.report.layer_timeline import draw_spans

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NODE = 8  # GPUs
INTRA, INTER = 300e9, 25e9  # bytes per second of a GPU's link, in one direction
TOKENS, DENSITY, COLUMNS = 524288, 0.05, 2048
HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128


@dataclass(frozen=True)
class Pass:
    """One layer's forward and backward on so many GPUs, in milliseconds."""

    ranks: int
    forward: Simulated
    backward: Simulated

    @property
    def milliseconds(self) -> float:
        return 1000 * (self.forward.seconds + self.backward.seconds)

    @property
    def waiting(self) -> float:
        """Mean over ranks of the share of the time that they wait."""
        waits = (self.forward.exposed + self.backward.exposed).mean()
        return float(waits) / (self.forward.seconds + self.backward.seconds)


@lru_cache(maxsize=64)
def layer_on(ranks: int, nested: bool, inter: float = INTER, slowest: float = 1.0) -> Pass:
    """Qwen2.5-3B's attention of 512K tokens at 5 % on H200 rates, striped, in nodes of eight.

    Args:
        nested: a ring of rings, one a node, or one flat ring.
        inter: bytes per second of a GPU's link to other nodes.
        slowest: how many times slower the last rank is.
    """
    rates = rates_of("h200")
    work = LayerWork.of(_index(), build_layout("striped", 128), ranks, HEADS, KV_HEADS, HEAD_DIM)
    outer = max(1, ranks // NODE) if nested else 1
    slow = [1.0] * (ranks - 1) + [slowest]
    network = Network(NODE, Link.of_rate(INTRA), Link.of_rate(inter))
    return Pass(ranks, *attention_passes(work, outer, rates, network, slow))


@lru_cache(maxsize=1)
def _index() -> Index:
    return Index.prescribed(prescribed_pattern(DENSITY, COLUMNS, TOKENS), TOKENS, HEADS)


def scaling_figure(ranks: Sequence[int]) -> Figure:
    """Milliseconds of a layer by number of GPUs, a flat ring and a ring of rings, and what links alone would take."""
    figure = new_figure(figsize=(7, 3.6))
    axes = figure.subplots()
    alone = layer_on(1, False).milliseconds
    axes.plot(ranks, [alone / n for n in ranks], color=GREEN, linestyle=":", label="one GPU's time, divided")
    for nested, colour, label in ((False, GREY, "one flat ring"), (True, BLUE, "rings of eight")):
        times = [layer_on(n, nested).milliseconds for n in ranks]
        axes.plot(ranks, times, color=colour, marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.set_xlabel("GPUs that share one sequence of 512K tokens, in nodes of eight")
    axes.set_ylabel("ms a layer, forward + backward")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def binding_figure(ranks: Sequence[int]) -> Figure:
    """Where a layer's time goes in rings of eight: kernels, and waiting for messages, mean over ranks."""
    figure = new_figure(figsize=(7, 0.55 * len(ranks) + 1))
    axes = figure.subplots()
    found = [layer_on(n, True) for n in ranks]
    waits = [one.waiting * one.milliseconds for one in found]
    busy = [one.milliseconds - wait for one, wait in zip(found, waits, strict=True)]
    places = range(len(ranks))
    axes.barh(places, busy, color=BLUE, label="computing")
    axes.barh(places, waits, left=busy, color=ORANGE, label="waiting for messages")
    for place, one in enumerate(found):
        axes.text(one.milliseconds, place, f" {one.milliseconds:.1f} ms", va="center")
    axes.set_yticks(places, [f"{n} GPUs" for n in ranks])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(one.milliseconds for one in found))
    axes.set_xlabel("ms a layer, forward + backward")
    axes.legend(loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def timelines_figure(ranks: int = 32) -> Figure:
    """The last rank's forward pass in a flat ring and in rings of eight."""
    figure = new_figure(figsize=(9, 3.8))
    panels = figure.subplots(2, 1, sharex=True)
    for axes, nested, name in zip(panels, (False, True), ("one flat ring", "rings of eight"), strict=True):
        forward = layer_on(ranks, nested).forward
        draw_spans(axes, forward.spans)
        axes.set_title(f"{name}: {1000 * forward.seconds:.1f} ms forward", fontsize=10)
    panels[-1].set_xlabel(f"milliseconds since the pass began, last of {ranks} ranks")
    return figure


def lowest_rate(ranks: int, nested: bool, waiting: float = 0.05) -> float:
    """The slowest link to other nodes, bytes per second, at which ranks wait for less than this share of the time."""
    low, high = 1e9, 1e13
    for _ in range(12):
        middle = (low * high) ** 0.5
        if layer_on(ranks, nested, middle).waiting < waiting:
            high = middle
        else:
            low = middle
    return high


def table(ranks: Sequence[int]) -> list[tuple[int, float, float, float, float]]:
    """(GPUs, flat ms, share of waits, rings of eight ms, share of waits)."""
    pairs = [(layer_on(n, False), layer_on(n, True)) for n in ranks]
    return [
        (flat.ranks, flat.milliseconds, flat.waiting, nested.milliseconds, nested.waiting)
        for flat, nested in pairs
    ]
