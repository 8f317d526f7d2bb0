"""`mtraining bench`: how long things take, beside what a user would otherwise pick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

bench = typer.Typer(no_args_is_help=True, help="Measure, beside what you would otherwise use.")


@bench.callback()
def _bench() -> None:
    """Measure, beside what you would otherwise use."""


def print_table(console: Console, title: str, heads: list[str], cells: list[list[str]]) -> None:
    """A narrow terminal may break its lines, but a cell cut short would be no number."""
    from rich.table import Table

    shown = Table(*heads, title=title)
    for row in cells:
        shown.add_row(*row)
    console.width = max(
        console.width, console.measure(shown, options=console.options.update(max_width=500)).maximum
    )
    console.print(shown)


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
    warm_up: Annotated[
        float,
        typer.Option(
            help="Seconds of the same work before each timing; under 0.1 for the clocks of a GPU that comes from "
            "idling."
        ),
    ] = 2.0,
) -> None:
    """Time sparse attention against dense kernels; nothing wrong is timed. Writes a CSV."""
    from rich.console import Console

    from mtraining.bench.attention.run import bench as run
    from mtraining.bench.record import table

    console = Console()
    result, path = run(
        preset,
        backend or [],
        device,
        max_seq_len,
        dense or [],
        out,
        warm_up,
        say=lambda text: console.print(text, markup=False, highlight=False),
    )
    print_table(console, "Attention", *table(result.rows))
    console.print(f"wrote {path}" if path else "no number to write", soft_wrap=True)
    if result.failures:
        raise typer.Exit(1)


@bench.command()
def train(
    preset: Annotated[str, typer.Option(help="table or tiny; default: table, on a CPU tiny.")] = "",
    model: Annotated[str, typer.Option(help="Shape of the model: qwen2.5-3b or tiny.")] = "",
    seq_len: Annotated[
        list[str] | None, typer.Option(help="Tokens a sequence, such as 512K; may be repeated.")
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Computed share of attention, such as 0.05; may be repeated.")
    ] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="striped, zigzag or contiguous; may be repeated.")
    ] = None,
    ring: Annotated[
        list[str] | None, typer.Option(help="flat, or OUTERxINNER such as 2x2; may be repeated.")
    ] = None,
    recompute: Annotated[
        list[str] | None, typer.Option(help="full, keep_attention or none; may be repeated.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Decoder layers, of both sides.")] = None,
    dense: Annotated[bool | None, typer.Option(help="Time the dense step too.")] = None,
    kernel: Annotated[str, typer.Option(help="Attention backend of sparse steps.")] = "",
    dense_kernel: Annotated[str, typer.Option(help="Attention backend of dense steps.")] = "",
    fused: Annotated[str, typer.Option(help="What surrounds attention: none, compile or liger.")] = "",
    offload: Annotated[bool | None, typer.Option(help="Keep activations in host memory.")] = None,
    warmup: Annotated[int, typer.Option(help="Steps before the timed ones.")] = 1,
    steps: Annotated[int, typer.Option(help="Timed steps at most; the median counts.")] = 5,
    seconds: Annotated[float, typer.Option(help="Time fewer steps where they would take longer.")] = 60.0,
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = "",
    nproc: Annotated[int | None, typer.Option(help="Processes; default: one a GPU, two on a CPU.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the CSV.")] = Path("benchmarks/results"),
    chart: Annotated[Path | None, typer.Option(help="Draw the result into this SVG file.")] = None,
) -> None:
    """Time whole training steps, sparse beside dense, on all GPUs; nothing wrong is timed. Writes a CSV."""
    from rich.console import Console

    from mtraining.bench.train.record import table
    from mtraining.bench.train.run import Choice
    from mtraining.bench.train.run import bench as run

    console = Console()
    choice = Choice(
        preset, model, seq_len or (), density or (), layout or (), ring or (), recompute or (), layers, dense, kernel,
        dense_kernel, fused, offload, warmup, steps, seconds, device, nproc, str(out), str(chart or ""),
    )  # fmt: skip
    outcome = run(choice)
    if outcome is None:  # torchrun's first process tells
        return
    print_table(console, "Training steps", *table(outcome.rows))
    for line in (*outcome.failures, *outcome.notes):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"wrote {outcome.path}" if outcome.path else "no number to write", soft_wrap=True)
    if outcome.failures:
        raise typer.Exit(1)


@bench.command()
def tiles(
    head_dim: Annotated[
        list[int] | None, typer.Option(help="64, 96, 128 or 256; may be repeated; default: all.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bf16, fp16 or fp32; may be repeated; default: bf16.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Of the pattern, in tokens; default: 128.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of what is timed; default: 32768.")] = None,
) -> None:
    """Find the fastest tiles for the portable kernels on this GPU, and keep them for training."""
    from rich.console import Console

    from mtraining.errors import UserError

    try:
        from mtraining.bench.tiles.run import bench as run
        from mtraining.bench.tiles.run import table
    except ImportError as missing:
        raise UserError(
            f"bench tiles needs the triton package ({missing}); install mtraining[gpu]."
        ) from missing

    console = Console()
    result, path = run(
        head_dim or (),
        dtype or (),
        block_size,
        seq_len,
        say=lambda text: console.print(text, markup=False, highlight=False),
    )
    print_table(console, "Tiles", *table(result))
    for line in result.failures:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"wrote {path}" if path else "nothing to write", soft_wrap=True)
    if result.failures:
        raise typer.Exit(1)


@bench.command()
def decode(
    preset: Annotated[str, typer.Option(help="targets or tiny; default: targets, on a CPU tiny.")] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the CSV.")] = Path("benchmarks/results"),
) -> None:
    """Time decode attention over long caches beside a copy of memory; nothing wrong is timed. Writes a CSV."""
    from rich.console import Console

    from mtraining.bench.decode.run import bench as run
    from mtraining.bench.decode.run import table

    console = Console()
    rows, path, wrong = run(
        preset, dtype, device, out, say=lambda text: console.print(text, markup=False, highlight=False)
    )
    print_table(console, "Decode attention", *table(rows))
    for line in wrong:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"wrote {path}" if path else "no number to write", soft_wrap=True)
    if wrong:
        raise typer.Exit(1)
