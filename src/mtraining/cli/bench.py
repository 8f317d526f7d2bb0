"""`mtraining bench`: how long things take, beside what a user would otherwise pick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True, help="Measure, beside what you would otherwise use.")


@bench.callback()
def _bench() -> None:
    """Measure, beside what you would otherwise use."""


@bench.command()
def attention(
    preset: Annotated[
        str, typer.Option(help="targets, quick, growth or tiny; default: targets, on a CPU tiny.")
    ] = "",
    backend: Annotated[list[str] | None, typer.Option(help="Kernel to time; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = "",
    max_seq_len: Annotated[int | None, typer.Option(help="Leave longer sequences out.")] = None,
    dense: Annotated[
        list[str] | None,
        typer.Option(
            help="Dense kernel to time (fa4, cudnn, fa2, flex, math, or none); default: all that can run."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the CSV.")] = Path("benchmarks/results"),
) -> None:
    """Time sparse attention against dense kernels; nothing wrong is timed. Writes a CSV."""
    from rich.console import Console
    from rich.table import Table

    from mtraining.bench.attention import bench as run
    from mtraining.bench.record import table

    console = Console()
    result, path = run(
        preset,
        backend or [],
        device,
        max_seq_len,
        dense or [],
        out,
        say=lambda text: console.print(text, markup=False, highlight=False),
    )
    heads, cells = table(result.rows)
    shown = Table(*heads, title="Attention")
    for row in cells:
        shown.add_row(*row)
    # a narrow terminal may break lines, but a cell cut short would be no number
    console.width = max(console.width, console.measure(shown).maximum)
    console.print(shown)
    console.print(f"wrote {path}" if path else "no number to write", soft_wrap=True)
    if result.failures:
        raise typer.Exit(1)
