"""The report of a run: figures as SVG, and one HTML page that holds them."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtraining.errors import UserError
from mtraining.report.figures import (
    balance_figure,
    density_figure,
    evaluation_figure,
    read_json,
    ring_figure,
    training_figure,
)
from mtraining.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORLD = 8  # ranks of the balance figure, or the most that the run's sequences allow


def write_report(runs: Sequence[Path], out: Path) -> list[Path]:
    """Draw the first run's balance, density and ring steps and every run's loss, throughput and evaluations into
    ``out``.

    Args:
        runs: run folders; those after the first are only compared with it.

    Returns:
        the files written, the HTML page last.

    Raises:
        UserError: a folder without metrics, or matplotlib missing.
    """
    metrics = {run.name: read_metrics(run) for run in runs}
    for run in runs:
        if not any("loss" in record for record in metrics[run.name]):
            raise UserError(f"report: {run} holds no metrics.jsonl with steps; give the folder of a run.")
    figures: dict[str, Figure | None] = {
        "balance": balance_figure(read_json(runs[0] / "balance.json")["layouts"], WORLD),
        "training": training_figure(metrics),
        "evaluation": evaluation_figure(metrics),
        "density": density_figure(metrics[runs[0].name]),
        "ring": ring_figure(metrics[runs[0].name]),
    }
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = out / f"{name}.svg"
            figure.savefig(path, metadata={"Date": None})
            # matplotlib leaves blanks at line ends, which version control complains about
            path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
            written.append(path)
    page = out / "report.html"
    page.write_text(_page(runs, written), encoding="utf-8")
    return [*written, page]


def _page(runs: Sequence[Path], figures: Sequence[Path]) -> str:
    title = html.escape(", ".join(str(run) for run in runs))
    rows = "".join(_row(run) for run in runs)
    pictures = "".join(f"<h2>{path.stem}</h2>{_inline(path)}" for path in figures)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        "<style>body{font:16px sans-serif;max-width:60rem;margin:2rem auto}td,th{padding:.2rem 1rem;text-align:left}"
        "svg{max-width:100%;height:auto}</style>"
        f"<h1>{title}</h1><table><tr><th>run<th>step<th>loss<th>held-out loss<th>tokens/s</tr>{rows}</table>"
        f"{pictures}</html>\n"
    )


def _row(run: Path) -> str:
    """A run's last step, and its last held-out loss."""
    records = read_metrics(run)
    last = next(record for record in reversed(records) if "loss" in record)
    held_out = next((one for one in reversed(records) if "held_out_loss" in one), None)
    shown = f"{held_out['held_out_loss']:.4f} (step {held_out['step']})" if held_out else "-"
    return (
        f"<tr><td>{html.escape(run.name)}</td><td>{html.escape(str(last['step']))}</td><td>{last['loss']:.4f}</td>"
        f"<td>{shown}</td><td>{last['tokens_per_second']:,.0f}</td></tr>"
    )


def _inline(path: Path) -> str:
    text = path.read_text()
    return text[text.index("<svg") :]
