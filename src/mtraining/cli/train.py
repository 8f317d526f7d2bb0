"""`mtraining train`: run a configuration, alone, under torchrun, or on local processes of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtraining.errors import UserError

if TYPE_CHECKING:
    from mtraining.train.config import Config

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Override one option; the value is read as YAML."
    ),
]


def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML file; recipes/ has examples.")],
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Start this many local processes.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only predict the memory of each GPU; refuse what cannot fit.")
    ] = False,
    memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of a GPU for --dry-run; default: of the GPU here.")
    ] = None,
) -> None:
    """Train a model as CONFIG says. Running the same command again resumes from the last checkpoint.

    SIGTERM, SIGUSR1 and Ctrl-C end the run after the step in progress, saved, with exit code 75; the same signal once
    more ends it at once."""
    from mtraining.train.config import load_config

    settings = load_config(config, overrides or [])
    if dry_run:
        _dry_run(settings, memory_gib)
        return
    if memory_gib is not None:
        raise UserError("--memory-gib says what --dry-run has to fit into; add --dry-run, or leave it out.")
    from mtraining.train.display import quiet_libraries
    from mtraining.train.launch import launch, run_launched
    from mtraining.train.loop import train as run

    if "RANK" in os.environ:
        if nproc is not None:
            raise UserError(
                "--nproc starts processes of its own; leave it out under torchrun or another launcher."
            )
        run_launched(settings)
    elif nproc is not None and nproc > 1:
        launch(settings, nproc)
    else:
        quiet_libraries()
        run(settings)


def _dry_run(settings: Config, memory_gib: float | None) -> None:
    """Print what a step takes of each GPU, by component, and refuse what does not fit. Needs no data and no GPU."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from mtraining.predict.memory import GIB
    from mtraining.sizes import size_text
    from mtraining.train.memory_report import predict_config

    prediction = predict_config(settings)
    console = Console()
    world = settings.parallel.world
    gpus = f"{world} GPU{'s' if world > 1 else ''}"
    shown = Table("on each GPU", "memory", title=f"{gpus}, {settings.train.seq_len} tokens")
    shown.columns[1].justify = "right"
    for name, size in prediction.table():
        shown.add_row(name, size_text(size), style="bold" if name.startswith(("peak", "needed")) else "")
    console.print(shown)
    memory = None if memory_gib is None else memory_gib * GIB
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    if memory is None:
        console.print("no GPU here to compare with; --memory-gib says how much one has", soft_wrap=True)
        return
    prediction.check(memory)
    console.print(f"fits into {size_text(memory)}", soft_wrap=True)
