"""`mtraining report`: one page that compares runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, and folders of mtraining evaluate. Losses are compared with a dense run."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="A folder for report.html; default: report in the first RUN.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="A folder for every chart as SVG and PDF besides; default: none.")
    ] = None,
    watch: Annotated[
        int | None,
        typer.Option(min=1, help="Write the page again every so many seconds, until no run goes on."),
    ] = None,
) -> None:
    """Show RUNS on one page that needs no network: losses, speed, density, recall, balance, memory, options."""
    from mtraining.errors import UserError
    from mtraining.report import watch_report, write_report

    folder = out or runs[0] / "report"
    if watch is not None:
        if figures is not None:
            raise UserError("--figures with --watch would draw them again and again; use one of the two.")
        watch_report(runs, folder, watch, typer.echo)
        return
    for path in write_report(runs, folder, figures):
        typer.echo(f"wrote {path}")
