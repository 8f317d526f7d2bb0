"""`mtraining demo`: the quickstart. Sparse and dense training side by side, on two processes of this machine."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from mtraining.errors import UserError


def demo(
    out: Annotated[Path, typer.Option(help="Where data, runs and results go.")] = Path("runs/quickstart"),
    recipe: Annotated[Path, typer.Option(help="The recipe to run.")] = Path("recipes/quickstart.yaml"),
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one option of both runs."),
    ] = None,
) -> None:
    """Train a small model on Python's standard library with sparse attention, then with dense, and compare them."""
    from rich.console import Console

    from mtraining.data import PrepareOptions, prepare
    from mtraining.train.config import load_config
    from mtraining.train.launch import launch
    from mtraining.train.metrics import read_metrics

    console = Console()
    given = overrides or []
    base = load_config(recipe, given)
    dense = f"pattern={{name: dense, block_size: {base.pattern.build().block_size}}}"
    console.print(f"[bold]Preparing[/bold] the Python standard library in {out / 'data'}")
    prepare(PrepareOptions(sources=("stdlib",), out=out / "data"))
    metrics: dict[str, list[dict[str, Any]]] = {}
    for name, extra in (("sparse", []), ("dense", [dense, "log.recall_rows=0", "checkpoint.export=false"])):
        run = out / name
        _clear(run)
        config = load_config(recipe, [*given, f"output={run}", f"data.path={out / 'data'}", *extra])
        console.print(
            f"[bold]Training[/bold] {name}: {config.train.steps} steps on {config.parallel.world} processes"
        )
        launch(config, config.parallel.world)
        metrics[name] = read_metrics(run)
    layouts = json.loads((out / "sparse" / "balance.json").read_text(encoding="utf-8"))["layouts"]
    results = summarise(metrics["sparse"], metrics["dense"], layouts, base.parallel.cp)
    results["checkpoint"] = str(max((out / "sparse" / "checkpoints").glob("step_*")))
    results["run"] = str(out / "sparse")
    (out / "demo.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    write_loads(out / "balance.csv", layouts)
    console.print(_table(results))
    console.print(f"run folder  {results['run']}\ncheckpoint  {results['checkpoint']}", highlight=False)
    console.print(f"model       {out / 'sparse' / 'export'} (loads in plain transformers)", highlight=False)
    console.print(f"numbers     {out / 'demo.json'}, {out / 'balance.csv'}", highlight=False)


def summarise(
    sparse: list[dict[str, Any]], dense: list[dict[str, Any]], layouts: list[dict[str, Any]], cp: int
) -> dict[str, Any]:
    """What the table shows: last-step numbers of both runs, and the balance of the last index by layout and ranks."""
    last = sparse[-1]
    return {
        "step": last["step"],
        "loss_sparse": last["loss"],
        "loss_dense": dense[-1]["loss"],
        "loss_difference": last["loss"] / dense[-1]["loss"] - 1,
        "density": last["density"],
        "layer_density": last["layer_density"],
        "recall": last["recall"],
        "tokens_per_second_sparse": _speed(sparse),
        "tokens_per_second_dense": _speed(dense),
        "cp": cp,
        "balance": [{key: entry[key] for key in ("layout", "world", "worker", "step")} for entry in layouts],
    }


def write_loads(path: Path, layouts: list[dict[str, Any]]) -> None:
    """Tile work of the last index by layout, number of ranks, rank and ring step, as CSV for the README's figure."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["layout", "world", "rank", "step", "tiles"])
        for entry in layouts:
            for rank, steps in enumerate(entry["load"]):
                for step, tiles in enumerate(steps):
                    rows.writerow([entry["layout"], entry["world"], rank, step, round(tiles, 3)])


def _speed(records: list[dict[str, Any]]) -> float:
    """Median tokens per second; the first step warms up, and is left out when there are others."""
    return statistics.median(record["tokens_per_second"] for record in records[1:] or records)


def _clear(run: Path) -> None:
    """Remove an earlier demo's run, recognised by its configuration; anything else in the way is the user's."""
    if (run / "config.yaml").is_file():
        shutil.rmtree(run)
    elif run.exists() and any(run.iterdir()):
        raise UserError(f"--out: {run} holds something that is not a run; choose another folder.")


def _table(results: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"After {results['step']} steps", show_header=True)
    for column in ("", "sparse", "dense", "difference"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "loss",
        f"{results['loss_sparse']:.4f}",
        f"{results['loss_dense']:.4f}",
        f"{results['loss_difference']:+.2%}",
    )
    speeds = results["tokens_per_second_sparse"], results["tokens_per_second_dense"]
    table.add_row("tokens/s", f"{speeds[0]:,.0f}", f"{speeds[1]:,.0f}", f"x {speeds[0] / speeds[1]:.2f}")
    table.add_row("attention density", f"{results['density']:.1%}", "100%", "")
    table.add_row("attention mass kept (recall)", f"{results['recall']:.1%}", "100%", "")
    table.add_section()
    table.add_row("[bold]imbalance of this index (max / mean)", "[bold]striped", "[bold]zigzag", "")
    worlds = sorted({entry["world"] for entry in results["balance"]})
    for world in worlds:
        by_layout = {entry["layout"]: entry for entry in results["balance"] if entry["world"] == world}
        what = "this run" if world == results["cp"] else "if it had them"
        for kind in ("worker", "step"):
            cells = [
                f"{by_layout[name][kind]:.2f}" if name in by_layout else "-" for name in ("striped", "zigzag")
            ]
            table.add_row(f"  {kind}s, {world} ranks ({what})", *cells, "")
    return table
