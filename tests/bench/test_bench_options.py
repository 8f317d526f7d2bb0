"""One list of options makes the command line, the modules' own parsers, and what started processes are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer.main

from mtraining.bench.attention.cases import PRESETS as ATTENTION_PRESETS
from mtraining.bench.attention.competitors import COMPETITORS
from mtraining.bench.options import (
    AttentionOptions,
    RingOptions,
    TilesOptions,
    TrainOptions,
    arguments,
    options_of,
    parse,
)
from mtraining.bench.train.cases import PRESETS, SHAPES
from mtraining.cli import app

KINDS = {"attention": AttentionOptions, "ring": RingOptions, "tiles": TilesOptions, "train": TrainOptions}
GIVEN = TrainOptions(
    preset="tiny", seq_len=("1K", "2K"), density=(0.05, 0.5), layers=3, dense=False, offload=True, seconds=2.5,
    nproc=2, out=Path("a folder"), chart=Path("c.svg"),
)  # fmt: skip


@pytest.mark.parametrize("options", [GIVEN, TrainOptions(), TilesOptions(head_dim=(64, 96))])
def test_what_started_processes_are_told_is_what_was_given(options: Any) -> None:
    assert parse(type(options), "test", None, arguments(options))[0] == options


def test_internal_options_are_apart() -> None:
    options, told = parse(RingOptions, "test", None, ["--nproc=2", "--progress=p"], "progress")
    assert options == RingOptions(nproc=2) and told == {"progress": "p"}


@pytest.mark.parametrize("name", KINDS)
def test_the_command_has_each_option_once_with_its_default(name: str) -> None:
    command: Any = typer.main.get_command(app).commands["bench"].commands[name]  # type: ignore[attr-defined]
    shown = {option.name: option for option in command.params}
    assert shown.keys() == {option.name for option in options_of(KINDS[name])}
    for option in options_of(KINDS[name]):
        assert shown[option.name].help == option.help
        assert bool(shown[option.name].multiple) == option.repeated


def test_help_names_what_there_is() -> None:
    texts = {(kind, option.name): option.help for kind, of in KINDS.items() for option in options_of(of)}
    for (kind, name), known in {
        ("attention", "preset"): ATTENTION_PRESETS, ("attention", "dense"): COMPETITORS,
        ("train", "preset"): PRESETS, ("train", "model"): SHAPES,
    }.items():  # fmt: skip
        assert all(word in texts[kind, name] for word in known), name
