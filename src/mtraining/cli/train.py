"""`mtraining train`: run a configuration, alone, under torchrun, or on local processes of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtraining.cli.dry_run import DryRun, MemoryGib, refuse_memory, show_memory
from mtraining.errors import UserError
from mtraining.imports import no_garbage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtraining.model.recompute import LayerPolicy
    from mtraining.train.config import Config
    from mtraining.train.evaluation import SuiteBuilder

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
    dry_run: DryRun = False,
    memory_gib: MemoryGib = None,
) -> None:
    """Train a model as CONFIG says. Running the same command again resumes from the last checkpoint.

    SIGTERM, SIGUSR1 and Ctrl-C end the run after the step in progress, saved, with exit code 75; the same signal once
    more ends it at once."""
    from mtraining.train.config import load_config

    settings = load_config(config, overrides or [])
    if dry_run:
        _dry_run(settings, memory_gib)
        return
    refuse_memory(memory_gib)
    from mtraining.train.launch import launch, run_launched
    from mtraining.train.start import command_began

    began = command_began()
    suites: SuiteBuilder | None = None
    if settings.evaluate.suites:
        from mtraining.evaluate.in_training import build_suite

        suites = build_suite
    if "RANK" in os.environ:
        if nproc is not None:
            raise UserError(
                "--nproc starts processes of its own; leave it out under torchrun or another launcher."
            )
        run_launched(settings, suites, began)
    elif nproc is not None and nproc > 1:
        launch(settings, nproc, suites=suites, began=began)
    else:
        with no_garbage():
            from mtraining.train.display import quiet_libraries
            from mtraining.train.loop import train as run

        quiet_libraries()
        run(settings, suites, began)


def _dry_run(settings: Config, memory_gib: float | None) -> None:
    """Print what a step takes of each GPU, and an evaluation; refuse what does not fit. Needs no data and no GPU."""
    from mtraining.train.memory_report import predict_config, predict_evaluations

    world = settings.parallel.world
    title = f"{world} GPU{'s' if world > 1 else ''}, {settings.train.seq_len} tokens"
    policies = _chosen(settings, memory_gib) if settings.train.recompute == "auto" else None
    shown = [(title, predict_config(settings, policies=policies))]
    evaluated = predict_evaluations(settings)
    if evaluated is not None:
        shown.append((f"evaluation: {evaluated[0]}", evaluated[1]))
    show_memory(shown, memory_gib)


def _chosen(settings: Config, memory_gib: float | None) -> Sequence[LayerPolicy]:
    """What each layer is to keep on the GPU here, or one with as much memory as is given; told too."""
    import torch

    from mtraining.predict.memory import GIB
    from mtraining.predict.recompute import Room
    from mtraining.train.memory_report import workload
    from mtraining.train.recompute import choose, gpu_memory, known_rates

    here = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if memory_gib is None and here.type == "cpu":
        raise UserError(
            "--dry-run: train.recompute=auto chooses by the memory of a GPU, and there is none here; add --memory-gib "
            "with the memory of one, such as 79.1."
        )
    room = Room.of(gpu_memory(here) if memory_gib is None else memory_gib * GIB)
    choice = choose(workload(settings), room, known_rates(here))
    typer.echo(choice.render(room))
    return choice.policies
