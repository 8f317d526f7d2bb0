"""`mtraining bench`: how long things take, beside what a user would otherwise pick."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtraining.bench.options import (
    AttentionOptions,
    DecodeOptions,
    RatesOptions,
    RingOptions,
    TilesOptions,
    TrainOptions,
    options_of,
)

if TYPE_CHECKING:
    from rich.console import Console

bench = typer.Typer(no_args_is_help=True, help="Measure, beside what you would otherwise use.")


@bench.callback()
def _bench() -> None:
    """Measure, beside what you would otherwise use."""


def _command(kind: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Make a subcommand of a function of the options ``kind``, with a command-line option for each of them."""

    def decorate(run: Callable[[Any], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            run(kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}))

        parameters = [
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=list(option.default) if option.repeated else option.default,
                annotation=Annotated[
                    list[option.kind] if option.repeated else option.kind | None,  # type: ignore[name-defined]
                    typer.Option(help=option.help),
                ],
            )
            for option in options_of(kind)
        ]
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return bench.command()(command)

    return decorate


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


def _console() -> tuple[Console, Callable[[str], None]]:
    """Where results go, and what prints a line as it is."""
    from rich.console import Console

    console = Console()
    return console, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)


@_command(AttentionOptions)
def attention(options: AttentionOptions) -> None:
    """Time sparse attention against dense kernels; nothing wrong is timed. Writes a CSV."""
    from mtraining.bench.attention.run import bench as run
    from mtraining.bench.record import table

    console, say = _console()
    result, path = run(options, say)
    print_table(console, "Attention", *table(result.rows))
    say(f"wrote {path}" if path else "no number to write")
    if result.failures:
        raise typer.Exit(1)


@_command(RatesOptions)
def rates(options: RatesOptions) -> None:
    """Measure what mtraining plan must know of this machine's GPUs. Writes a file."""
    from mtraining.bench.rates.run import bench as run

    status = run(options)
    if status:
        raise typer.Exit(status)


@_command(RingOptions)
def ring(options: RingOptions) -> None:
    """Time ring attention over all GPUs against one GPU's share; nothing wrong is timed. Writes a CSV."""
    from mtraining.bench.ring.run import bench as run

    status = run(options)
    if status:
        raise typer.Exit(status)


@_command(TrainOptions)
def train(options: TrainOptions) -> None:
    """Time whole training steps, sparse beside dense, on all GPUs; nothing wrong is timed. Writes a CSV."""
    from mtraining.bench.train.record import table
    from mtraining.bench.train.run import bench as run

    console, say = _console()
    outcome = run(options)
    # torchrun's first process has the outcome.
    if outcome is None:
        return
    print_table(console, "Training steps", *table(outcome.rows))
    for line in (*outcome.failures, *outcome.notes):
        say(line)
    say(f"wrote {outcome.path}" if outcome.path else "no number to write")
    if outcome.failures:
        raise typer.Exit(1)


@_command(TilesOptions)
def tiles(options: TilesOptions) -> None:
    """Find the fastest tiles for the portable kernels on this GPU, and keep them for training."""
    from mtraining.errors import UserError

    try:
        from mtraining.bench.tiles.run import bench as run
        from mtraining.bench.tiles.run import table
    except ImportError as missing:
        raise UserError(
            f"bench tiles needs the triton package ({missing}); install mtraining[gpu]."
        ) from missing

    console, say = _console()
    result, path = run(options.head_dim, options.dtype, options.block_size, options.seq_len, say=say)
    print_table(console, "Tiles", *table(result))
    for line in result.failures:
        say(line)
    say(f"wrote {path}" if path else "nothing to write")
    if result.failures:
        raise typer.Exit(1)


@_command(DecodeOptions)
def decode(options: DecodeOptions) -> None:
    """Time decode attention over long caches beside a copy of memory; nothing wrong is timed. Writes a CSV."""
    from mtraining.bench.decode.run import bench as run
    from mtraining.bench.decode.run import table

    console, say = _console()
    rows, path, wrong = run(options.preset, options.dtype, options.device, options.out, say=say)
    print_table(console, "Decode attention", *table(rows))
    for line in wrong:
        say(line)
    say(f"wrote {path}" if path else "no number to write")
    if wrong:
        raise typer.Exit(1)
