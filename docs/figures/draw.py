"""Draw the figures of the pages: `python docs/figures/draw.py` writes every SVG beside this file.

What a figure shows is computed by the package (masks, layouts, work of ranks) or read from benchmarks/results. A few
show a schedule, whose numbers are in the figure. Nothing is drawn by hand.
"""

from __future__ import annotations

import csv
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mtraining.evaluate.heatmap import needle_figure
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.report.drawing import BLUE, GREEN, GREY, ORANGE
from mtraining.ring import imbalance, tile_work
from mtraining.ring.balance import by_step

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
# The same file from the same data: no date, no random names, text left as text.
STYLE = {"svg.hashsalt": "mtraining", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}
# With another version of matplotlib the same figure is other text.
DRAWN_WITH = "3.11.2"
LIGHT = "#e8e8e8"


def rows(name: str) -> list[dict[str, str]]:
    """A result file of benchmarks/results."""
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def example_index(blocks: int, block_size: int, diagonals: list[int], columns: list[int]) -> SparseIndex:
    """One head of one sequence."""
    bits = torch.zeros(1, 1, blocks, dtype=torch.bool)
    bits[0, 0, diagonals] = True
    positions = torch.tensor(columns, dtype=torch.int32)[None, None]
    return SparseIndex(blocks * block_size, block_size, bits, positions)


def mask_panel(axes: Axes, index: SparseIndex, title: str) -> None:
    """The entries that are computed: tiles in one colour, columns in another, the rest of the past in grey."""
    tokens, size = index.seq_len, index.block_size
    block = torch.arange(index.num_blocks)
    tiles = index.tile_mask(block, block)[0, 0].repeat_interleave(size, 0).repeat_interleave(size, 1)
    past = torch.ones(tokens, tokens).tril().bool()
    picture = past.int()
    picture[index.to_mask()[0, 0] & past] = 3
    picture[tiles & past] = 2
    colours = ListedColormap(["white", LIGHT, BLUE, ORANGE])
    axes.imshow(picture.numpy(), cmap=colours, vmin=0, vmax=3, interpolation="nearest")
    axes.set_title(title)
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_xticks([])
    axes.set_yticks([])


def work_panel(axes: Axes, index: SparseIndex, layout: str, world: int, top: float) -> Any:
    """Tiles of each rank in each ring step."""
    work = tile_work(index, build_layout(layout, unit=index.block_size), world)
    degree = imbalance(work).worker
    image = axes.imshow(by_step(work).numpy(), cmap="magma_r", vmin=0, vmax=top, aspect="auto")
    axes.set_title(f"{layout}: slowest / mean {degree:.2f}")
    axes.set_xlabel("ring step")
    axes.set_xticks([0, world - 1])
    axes.set_yticks([0, world - 1])
    return image


def vertical_slash_example(blocks: int, heads: int = 16) -> SparseIndex:
    """Heads that each have a window and a few diagonals elsewhere, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(4)
    bits = torch.zeros(1, heads, blocks, dtype=torch.bool)
    bits[..., :2] = True
    for head in range(heads):
        bits[0, head, torch.randint(2, blocks, (max(2, blocks // 32),), generator=generator)] = True
    return SparseIndex(blocks * 8, 8, bits, torch.empty(1, heads, 0, dtype=torch.int32))


def step_seconds() -> dict[str, float]:
    """Measured seconds a training step: dense, and 5 % in stripes (two H200s, 512K tokens, 4 layers)."""
    found = {
        (row["pattern"], row["layout"]): float(row["step_seconds"])
        for row in rows("train-h200x2-2026-11-23.csv")
        if row["commit"] == "b295a5f"
    }
    return {"dense": found["dense", "zigzag"], "sparse, 5 %": found["toeplitz_random", "striped"]}


def overview() -> Figure:
    """What one gets, in four panels: what is computed, who computes it in two layouts, and the time of a step."""
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.1])
    index = example_index(24, 4, [0, 1, 7, 15], [0, 1, 30, 31, 57])
    mask_panel(panels[0], index, "one head computes little")
    spread, world = vertical_slash_example(256), 16
    top = max(
        by_step(tile_work(spread, build_layout(name, 8), world)).max() for name in ("zigzag", "striped")
    )
    for axes, name in zip(panels[1:3], ("zigzag", "striped"), strict=True):
        image = work_panel(axes, spread, name, world, float(top))
    panels[1].set_ylabel("GPU")
    figure.colorbar(image, ax=list(panels[1:3]), label="tiles")
    seconds = step_seconds()
    bars = panels[3].bar(list(seconds), list(seconds.values()), color=[GREY, BLUE], width=0.6)
    panels[3].bar_label(bars, [f"{value:.1f} s" for value in seconds.values()], padding=2)
    panels[3].set_title(f"a training step is {seconds['dense'] / seconds['sparse, 5 %']:.1f}x as fast")
    panels[3].set_ylabel("seconds, 512K tokens, 2 H200")
    panels[3].spines[["top", "right"]].set_visible(False)
    panels[3].set_ylim(0, 1.12 * seconds["dense"])
    return figure


def index_parts() -> Figure:
    """Slashes, columns, and both together."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    diagonals, columns = [0, 1, 6], [0, 1, 21, 34]
    for axes, (title, d, c) in zip(
        panels,
        (
            ("slashes: bits 0, 1 and 6", diagonals, []),
            ("columns: 4 key positions", [], columns),
            ("the index: their union", diagonals, columns),
        ),
        strict=True,
    ):
        mask_panel(axes, example_index(12, 4, d, c), title)
    return figure


def layouts() -> Figure:
    """Which rank holds which block of the sequence."""
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    panels = figure.subplots(3, 1)
    world, blocks = 4, 16
    for axes, name in zip(panels, ("contiguous", "zigzag", "striped"), strict=True):
        positions = build_layout(name, unit=1).positions(blocks, world)
        owner = torch.empty(blocks, dtype=torch.int64)
        for rank in range(world):
            owner[positions[rank]] = rank
        axes.imshow(owner[None].numpy(), cmap=ListedColormap([BLUE, ORANGE, GREEN, GREY]), aspect="auto")
        for block in range(blocks):
            axes.text(block, 0, str(int(owner[block])), ha="center", va="center", color="white")
        axes.set_yticks([0], [name])
        axes.set_xticks([])
    panels[-1].set_xlabel("the sequence in 16 blocks; numbers and colours are ranks")
    return figure


def stripes() -> Figure:
    """Work of each rank in each ring step, by layout, for the same index."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    panels = figure.subplots(1, 3)
    index, world = vertical_slash_example(256), 16
    names = ("contiguous", "zigzag", "striped")
    top = max(by_step(tile_work(index, build_layout(name, 8), world)).max() for name in names)
    for axes, name in zip(panels, names, strict=True):
        image = work_panel(axes, index, name, world, float(top))
    panels[0].set_ylabel("rank")
    figure.colorbar(image, ax=list(panels), label="tiles in a ring step")
    return figure


def ring_of_rings() -> Figure:
    """When messages between nodes travel: two nodes of two ranks, a message takes 1.5 steps."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    slow = 1.5
    _lane(panels[0], "one flat ring", [(0, 1), (slow, 1), (2 * slow, 1), (3 * slow, 1)],
          [(0, slow), (slow, slow), (2 * slow, slow)])  # fmt: skip
    _lane(panels[1], "two rings of two", [(0, 1), (1, 1), (2, 1), (3, 1)], [(0, slow)])
    panels[1].set_xlabel("time, in steps of computing")
    panels[1].set_xlim(0, 3 * slow + 1.05)
    return figure


def _lane(
    axes: Axes, title: str, steps: list[tuple[float, float]], messages: list[tuple[float, float]]
) -> None:
    for number, (start, length) in enumerate(steps):
        axes.add_patch(Rectangle((start, 0.1), length, 0.8, facecolor=BLUE, edgecolor="white"))
        axes.text(start + length / 2, 0.5, f"step {number}", ha="center", va="center", color="white")
    for start, length in messages:
        axes.add_patch(Rectangle((start, 1.1), length, 0.8, facecolor=ORANGE, edgecolor="white"))
        axes.text(start + length / 2, 1.5, "between nodes", ha="center", va="center", color="white")
    axes.set_ylim(0, 2.1)
    axes.set_yticks([0.5, 1.5], ["GPU", "slow link"])
    axes.set_title(title)


def estimation() -> Figure:
    """A probe's probabilities, with the sums that choose columns and diagonals."""
    keys, probe = 64, range(56, 64)
    noise = numpy.random.default_rng(1).normal(size=(len(probe), keys))
    scores = torch.from_numpy(noise) * 0.4
    scores[:, [0, 21, 33]] += 2.5
    for row, position in enumerate(probe):
        scores[row, [position, position - 17]] += 3
        scores[row, position + 1 :] = -torch.inf
    probability = scores.softmax(1)
    columns = probability.sum(0)
    distances = torch.zeros(keys, dtype=torch.float64)
    for row, position in enumerate(probe):
        distances[: position + 1] += probability[row, : position + 1].flip(0)
    figure = Figure(figsize=(9, 4), layout="constrained")
    heat, by_column, by_distance = figure.subplots(3, 1, height_ratios=[1, 1.4, 1.4])
    heat.imshow(probability.numpy(), cmap="Blues", aspect="auto", interpolation="nearest")
    heat.set_title("attention of 8 probe queries over 64 keys")
    heat.set_yticks([])
    by_column.bar(range(keys), columns.numpy(), color=_heaviest(columns, 3, ORANGE))
    by_column.set_ylabel("mass")
    by_column.set_title("sums over the probe by key: the heaviest become columns")
    by_distance.bar(range(keys), distances.numpy(), color=_heaviest(distances, 2, BLUE))
    by_distance.set_ylabel("mass")
    by_distance.set_title("sums by distance (query - key): the heaviest become slashes")
    for axes in (heat, by_column, by_distance):
        axes.set_xlim(-0.5, keys - 0.5)
    return figure


def _heaviest(mass: torch.Tensor, count: int, colour: str) -> list[str]:
    chosen = set(mass.topk(count).indices.tolist())
    return [colour if place in chosen else LIGHT for place in range(len(mass))]


def slow_links() -> Figure:
    """Time of a pass as messages between nodes get slower, flat and hierarchical."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for ring, colour, label in (("flat", GREY, "one flat ring"), ("2x2", BLUE, "two rings of two")):
        found = [row for row in rows("link-delay-cpu-2026-11-23.csv") if row["ring"] == ring]
        delay = [float(row["delay_ms"]) / float(row["step_ms"]) for row in found]
        axes.plot(delay, [float(row["slowdown"]) for row in found], marker="o", color=colour, label=label)
    axes.set_xlabel("delay of a message between nodes, in forward steps")
    axes.set_ylabel("time, 1 = no delay")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def needle() -> Figure:
    """Needles that SmolLM2-135M found, by length and depth, dense."""
    found = [
        row
        for row in rows("needle-smollm2-h100-2026-11-27.csv")
        if row["attention"] == "dense" and row["task"] == "needle_numbers"
    ]
    grid = {(int(row["length"]), float(row["depth"])): float(row["found"]) for row in found}
    return needle_figure(grid, "SmolLM2-135M, dense, two samples a cell")


def attention_speed() -> Figure:
    """Share of the best dense kernel's TFLOP/s on the tiles that are computed."""
    named = [
        ("slash tiles, 32K", "32768", 26.9984, "0"),
        ("slash tiles, 128K", "131072", 25.9996, "0"),
        ("few tiles (7 a row), 32K", "32768", 6.99878, "0"),
        ("tiles and columns, 128K", "131072", 25.9996, "4096"),
    ]
    found = {
        (row["seq_len"], float(row["blocks_per_row"]), row["columns"], row["phase"]): float(row["ratio"])
        for row in rows("attention-h200-2026-11-23-2.csv")
        if (row["backend"], row["q_heads"], row["head_dim"]) == ("triton", "32", "128") and row["ratio"]
    }
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    for shift, phase, colour in ((-0.19, "forward", BLUE), (0.19, "backward", ORANGE)):
        shares = [found[tokens, tiles, columns, phase] for _, tokens, tiles, columns in named]
        bars = axes.barh([i + shift for i in range(len(named))], shares, 0.36, color=colour, label=phase)
        axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=2)
    axes.axvline(1, color=GREY, linestyle="--")
    axes.set_yticks(range(len(named)), [name for name, *_ in named])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xlabel("speed on computed tiles, 1 = dense flash-attn-4")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def training_step() -> Figure:
    """Seconds a training step in three layouts, beside dense attention."""
    found = [row for row in rows("train-h200x2-2026-11-23.csv") if row["commit"] == "b295a5f"]
    figure = Figure(figsize=(7, 2.2), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(found):
        dense, seconds = row["pattern"] == "dense", float(row["step_seconds"])
        axes.barh(place, seconds, color=GREY if dense else BLUE)
        gain = "" if dense else f", {float(row['speedup']):.1f}x"
        axes.text(seconds, place, f" {seconds:.2f} s{gain}", va="center")
    names = [f"{'dense' if row['pattern'] == 'dense' else '5 %'}, {row['layout']}" for row in found]
    axes.set_yticks(range(len(found)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(float(row["step_seconds"]) for row in found))
    axes.set_xlabel("seconds a training step, 512K tokens, 4 layers, 2 H200")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def rooms() -> Figure:
    """The rooms as the import lint has them: each may import from those below it."""
    settings = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    figure = Figure(figsize=(6, 0.42 * len(layers)), layout="constrained")
    axes = figure.subplots()
    for row, layer in enumerate(layers):
        names = [name.strip() for name in layer.split("|")]
        for place, name in enumerate(names):
            width = 1 / len(names)
            axes.add_patch(
                Rectangle((place * width, row), width, 0.8, facecolor=BLUE, edgecolor="white", linewidth=3)
            )
            axes.text((place + 0.5) * width, row + 0.4, name, ha="center", va="center", color="white")
        if row:
            axes.annotate(
                "", (0.5, row), (0.5, row - 0.2), arrowprops={"arrowstyle": "->", "color": GREY, "shrinkA": 0}
            )
    axes.set_ylim(len(layers), 0)
    axes.axis("off")
    return figure


def pipeline() -> Figure:
    """One block of the Hopper forward kernel: four tiles, two stages, times not to scale."""
    # (start, length, label) in each lane. A group's products are q k^T of a tile, then p v of the tile before.
    copies = [
        (-3.4, "k0"),
        (-2.6, "v0"),
        (-1.8, "q"),
        (-1.0, "k1"),
        (-0.2, "v1"),
        (2, "k2"),
        (6, "v2"),
        (6.8, "k3"),
        (10, "v3"),
    ]
    products: list[tuple[list[tuple[float, str]], list[tuple[float, float, str]]]] = []
    for group in (0, 1):
        first, steady = group, [2 + 2 * group + 4 * t for t in range(3)]
        cores = [(first, "q k0")]
        for t, start in enumerate(steady):
            cores += [(start, f"q k{t + 1}"), (start + 1, f"p{t} v{t}")]
        cores.append((14 + group, "p3 v3"))
        exponentials = [(first + 1.0, 1.0, "exp 0")]
        exponentials += [(start + 1.0, 1.8, f"exp {t + 1}") for t, start in enumerate(steady)]
        products.append((cores, exponentials))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots()

    def box(lane: float, start: float, length: float, label: str, colour: str) -> None:
        axes.add_patch(Rectangle((start, lane), length, 0.8, facecolor=colour, edgecolor="white"))
        axes.text(start + length / 2, lane + 0.4, label, ha="center", va="center", color="white", fontsize=7)

    for start, label in copies:
        box(4, start, 0.8, label, GREY)
    for group, (cores, exponentials) in enumerate(products):
        lane = 2 - 2 * group
        for start, label in cores:
            box(lane + 1, start, 1, label, BLUE if "q" in label else GREEN)
        for start, length, label in exponentials:
            box(lane, start, length, label, ORANGE)
    arrow = {"arrowstyle": "->", "color": "black", "linewidth": 1}
    axes.annotate("", (0, 3.8), (-2.6, 4), arrowprops=arrow)
    axes.text(-2.5, 3.45, "k_full", fontsize=7, ha="center")
    axes.annotate("", (2.05, 4), (2, 1.8), arrowprops=arrow)
    axes.text(2.1, 2.45, "k_empty", fontsize=7)
    for edge in (2, 14):
        axes.axvline(edge, color=GREY, linestyle=":", linewidth=1)
    for middle, name in ((-0.8, "prologue"), (8, "steady state"), (15, "drain")):
        axes.text(middle, 5.05, name, ha="center", fontsize=8, style="italic")
    lanes = [
        "group 1: exponentials",
        "group 1: tensor cores",
        "group 0: exponentials",
        "group 0: tensor cores",
        "copy engine (TMA)",
    ]
    axes.set_yticks([lane + 0.4 for lane in range(5)], lanes)
    axes.set_xticks([])
    axes.set_xlabel("time")
    axes.set_xlim(-3.6, 16.2)
    axes.set_ylim(-0.1, 5.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "overview": overview,
    "index": index_parts,
    "rooms": rooms,
    "layouts": layouts,
    "stripes": stripes,
    "ring-of-rings": ring_of_rings,
    "estimation": estimation,
    "pipeline": pipeline,
    "slow-links": slow_links,
    "attention-speed": attention_speed,
    "training-step": training_step,
    "needle": needle,
}


def numbered(svg: str) -> str:
    """Names of clips, markers and images by their order: matplotlib hashes positions, whose last bit may vary."""
    known: dict[str, str] = {}

    def name(found: re.Match[str]) -> str:
        return known.setdefault(found[0], f"{found[1]}{len(known)}")

    return re.sub(r"\b(p|m|image)[0-9a-f]{10}\b", name, svg)


def draw(folder: Path, figures: dict[str, Callable[[], Figure]] = FIGURES) -> list[Path]:
    """Write every figure into ``folder``; returns the paths."""
    written = []
    with matplotlib.rc_context(STYLE):
        for name, make in figures.items():
            path = folder / f"{name}.svg"
            make().savefig(path, format="svg", metadata={"Date": None, "Creator": None})
            # matplotlib ends some lines in blanks, which a diff would show
            text = path.read_text(encoding="utf-8")
            text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
            path.write_text(numbered(text), encoding="utf-8")
            written.append(path)
    return written


if __name__ == "__main__":
    for drawn in draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
        print(f"wrote {drawn}")
