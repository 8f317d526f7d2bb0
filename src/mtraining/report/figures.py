"""The figures of a report, drawn with matplotlib from a run folder's files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtraining.errors import UserError
from mtraining.train.evaluation import headline

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def balance_figure(entries: list[dict[str, Any]], world: int) -> Figure:
    """Work of each rank in each ring step, one panel a layout, on one colour scale.

    Args:
        entries: the ``layouts`` of a run's balance.json.
        world: which ring size to draw; the largest there is, up to this.
    """
    world = max(size for size in {entry["world"] for entry in entries} if size <= world)
    shown = [entry for entry in entries if entry["world"] == world]
    highest = max(max(map(max, entry["load"])) for entry in shown)
    figure = new_figure(figsize=(8, 3.6))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, entry in zip(panels, shown, strict=True):
        image = axes.imshow(entry["load"], cmap="magma_r", vmin=0, vmax=highest, aspect="auto")
        axes.set_title(
            f"{entry['layout']}: busiest rank {entry['worker']:.2f}x the mean,\nbusiest step {entry['step']:.2f}x",
            fontsize=10,
        )
        axes.set_xlabel("ring step")
        axes.set_xticks(range(world) if world <= 16 else range(0, world, 8))
    panels[0].set_ylabel("rank")
    panels[0].set_yticks(range(world) if world <= 16 else range(0, world, 8))
    figure.colorbar(image, ax=list(panels), label="tiles computed (mean of layers)")
    return figure


def training_figure(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """Loss and throughput by step, one line a run."""
    figure = new_figure(figsize=(8, 3))
    loss, speed = figure.subplots(1, 2)
    for name, everything in runs.items():
        records = [record for record in everything if "loss" in record]
        steps = [record["step"] for record in records]
        loss.plot(steps, [record["loss"] for record in records], label=name)
        speed.plot(steps, [record["tokens_per_second"] for record in records], label=name)
    for axes, label in ((loss, "loss"), (speed, "tokens/s")):
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend()
    speed.set_ylim(bottom=0)
    return figure


def evaluation_figure(runs: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """Held-out loss and suites' scores by step, one line a run, attention and length; and of the first run that has it
    the held-out loss by position at its first and last evaluation. None where no run was evaluated."""
    done = {name: [one for one in records if "evaluation" in one] for name, records in runs.items()}
    read = {name: [one for one in found if "held_out_loss" in one] for name, found in done.items()}
    asked = {name: [one for one in found if one.get("suites")] for name, found in done.items()}
    panels = 2 * any(read.values()) + any(asked.values())
    if not panels:
        return None
    figure = new_figure(figsize=(4 * panels, 3))
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if any(read.values()):
        loss, position = axes[:2]
        _plot_rows(loss, read, "held_out", "loss", ("attention", "length"))
        loss.set_ylabel("held-out loss")
        shown = next(found for found in read.values() if found)
        for record in (shown[0], shown[-1])[: len(shown)]:
            row = headline(record["held_out"])
            middles = [row["bucket"] * (place + 0.5) for place in range(len(row["by_position"]))]
            position.plot(middles, row["by_position"], marker=".", label=f"step {record['step']}")
        position.set_xlabel("position")
        position.set_ylabel("held-out loss")
        position.legend()
    if any(asked.values()):
        _plot_rows(axes[-1], asked, "suites", "score", ("task", "attention", "length"))
        axes[-1].set_ylabel("score (%)")
        axes[-1].set_ylim(0, 100)
    return figure


def _plot_rows(
    axes: Any, runs: dict[str, list[dict[str, Any]]], rows: str, value: str, told_apart: tuple[str, ...]
) -> None:
    """A value of an evaluation's rows by step; lines are named by their run, and by what else differs."""
    lines: dict[tuple[Any, ...], dict[int, float]] = {}
    for name, records in runs.items():
        for record in records:
            for row in record[rows]:
                key = (name, *(row[part] for part in told_apart))
                lines.setdefault(key, {})[record["step"]] = row[value]
    differ = [place for place, values in enumerate(zip(*lines, strict=True)) if len(set(values)) > 1]
    for key, points in lines.items():
        label = ", ".join(str(key[place]) for place in differ) or str(key[0])
        axes.plot(list(points), list(points.values()), marker=".", label=label)
    axes.set_xlabel("step")
    if len(lines) <= 8:
        axes.legend()


def density_figure(records: list[dict[str, Any]]) -> Figure | None:
    """Density of each layer by step; None where the run observed no attention."""
    observed = [record for record in records if "layer_density" in record]
    if not observed:
        return None
    figure = new_figure(figsize=(8, 3))
    axes = figure.subplots()
    for layer in range(len(observed[0]["layer_density"])):
        density = [100 * record["layer_density"][layer] for record in observed]
        axes.plot([record["step"] for record in observed], density, marker=".", label=f"layer {layer}")
    axes.set_xlabel("step")
    axes.set_ylabel("density (%)")
    axes.set_ylim(bottom=0)
    if len(observed[0]["layer_density"]) <= 8:
        axes.legend()
    return figure


def ring_figure(records: list[dict[str, Any]]) -> Figure | None:
    """Computing and exposed waiting of each ring step, from the last record that has them; None where none has."""
    timed = [record for record in records if "ring_forward_exposed" in record]
    if not timed:
        return None
    figure = new_figure(figsize=(8, 3))
    panels = figure.subplots(1, 2)
    for axes, phase in zip(panels, ("forward", "backward"), strict=True):
        compute, exposed = (
            [1000 * x for x in timed[-1][f"ring_{phase}_{what}"]] for what in ("compute", "exposed")
        )
        axes.bar(range(len(compute)), compute, label="computing")
        axes.bar(range(len(exposed)), exposed, bottom=compute, label="waiting for transfers")
        axes.set_title(f"{phase}, step {timed[-1]['step']}", fontsize=10)
        axes.set_xlabel("ring step")
        axes.set_ylabel("ms (mean of ranks)")
    panels[0].legend()
    return figure


def read_json(path: Path) -> Any:
    """A JSON file of a run folder.

    Raises:
        UserError: missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"report: {path} does not exist; give the folder of a run that logged its attention."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"report: {path} is not JSON ({error}); run the training again.") from None
