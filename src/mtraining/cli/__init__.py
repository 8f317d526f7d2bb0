"""The `mtraining` command. Each subcommand is one small module and one line in `COMMANDS`."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import Annotated, Any

import typer

from mtraining.cli.bench import bench
from mtraining.cli.calibrate import calibrate
from mtraining.cli.demo import demo
from mtraining.cli.env import env
from mtraining.cli.evaluate import evaluate
from mtraining.cli.export import export
from mtraining.cli.generate import generate
from mtraining.cli.inspect import inspect
from mtraining.cli.plan import plan
from mtraining.cli.prepare import prepare
from mtraining.cli.report import report
from mtraining.cli.train import train
from mtraining.errors import SAVED, RunStopped, UserError

COMMANDS = (train, plan, prepare, calibrate, export, generate, evaluate, report, inspect, demo, env)

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


# typer keeps the base class of its usage errors to itself.
_UsageError: Any = typer.BadParameter.__base__


def entry() -> None:
    """What the shell starts: `main`, and where processes were launched or joined, no more than its exit code after it.

    The interpreter's own end takes seconds then, and can wait for threads of libraries that wait for ended processes.
    """
    code: str | int | None = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    if "mtraining.train.watch" not in sys.modules or not isinstance(code, int | None):
        sys.exit(code)
    from mtraining.train.leaving import exit_now

    with contextlib.suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    exit_now(code or 0)


def main() -> None:
    """The command, to be called from Python as well. Bad input is one sentence on stderr and exit status 2, a stopped
    run one sentence and the status of its `RunStopped`, neither a traceback nor a box."""
    try:
        code = app(prog_name="mtraining", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except _UsageError as error:
        _tell_usage(error)
        sys.exit(2)
    except typer.Abort:
        sys.exit(1)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(error if error.code == SAVED else f"error: {error}", file=sys.stderr)
        sys.exit(error.code)


def _tell_usage(error: Any) -> None:
    """A command line that cannot be read, as one sentence; a command alone gets its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.ctx.get_help(), file=sys.stderr)
        return
    message = " ".join(str(error.format_message()).split()).rstrip(".?")
    message = message[0].lower() + message[1:].replace(". Did you mean", "; did you mean")
    at_fault = re.match(r"invalid value for '?(.+?)'?: (.*)", message)
    if at_fault is not None:
        option, fault = at_fault.groups()
        message = f"{option}: {fault[0].lower()}{fault[1:]}"
    command = error.ctx.command_path if error.ctx is not None else "mtraining"
    print(f"error: {message}; {command} --help lists what it takes.", file=sys.stderr)
