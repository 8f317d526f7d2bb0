"""`mtraining report`: figures and an HTML page from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders; the later ones are compared with the first.")
    ],
    out: Annotated[Path | None, typer.Option(help="Where to write; default: RUN/report.")] = None,
) -> None:
    """Draw what RUNS did: balance over ranks and ring steps, density by layer, loss, throughput."""
    from mtraining.report import write_report

    for path in write_report(runs, out or runs[0] / "report"):
        typer.echo(f"wrote {path}")
