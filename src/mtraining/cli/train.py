"""`mtraining train`: run a configuration, alone, under torchrun, or on local processes of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mtraining.errors import UserError

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
) -> None:
    """Train a model as CONFIG says. Running the same command again resumes from the last checkpoint."""
    from mtraining.train.config import load_config

    settings = load_config(config, overrides or [])
    from mtraining.train.display import quiet_libraries
    from mtraining.train.launch import launch, run_launched
    from mtraining.train.loop import train as run

    if "TORCHELASTIC_RUN_ID" in os.environ:
        if nproc is not None:
            raise UserError("--nproc starts processes of its own; leave it out under torchrun.")
        run_launched(settings)
    elif nproc is not None and nproc > 1:
        launch(settings, nproc)
    else:
        quiet_libraries()
        run(settings)
