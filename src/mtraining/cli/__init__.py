"""The `mtraining` command. Each subcommand is one small module and one line in `COMMANDS`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mtraining.cli.bench import bench
from mtraining.cli.calibrate import calibrate
from mtraining.cli.demo import demo
from mtraining.cli.evaluate import evaluate
from mtraining.cli.export import export
from mtraining.cli.generate import generate
from mtraining.cli.prepare import prepare
from mtraining.cli.report import report
from mtraining.cli.train import train
from mtraining.errors import SAVED, RunStopped, UserError

COMMANDS = (train, prepare, calibrate, export, generate, evaluate, report, demo)

app = typer.Typer(
    name="mtraining",
    help="Train language models on very long contexts with dynamic sparse ring attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(bench, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"mtraining {version('mtraining')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train language models on very long contexts with dynamic sparse ring attention."""


def main() -> None:
    """Entry point: bad input is one sentence on stderr and exit status 2, a stopped run one sentence and the status of
    its `RunStopped`, neither a traceback."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(error if error.code == SAVED else f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
