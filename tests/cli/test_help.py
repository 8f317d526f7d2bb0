"""Every command explains itself, quickly; the whole package imports."""

from __future__ import annotations

import importlib
import pkgutil
import resource
import sys
from typing import Any

import pytest
import typer.main

import mtraining
from mtraining.cli import app, main
from processes import run_command

OPTIONAL = {"triton", "flash_attn", "matplotlib"}
HELP_SECONDS = 8.0  # of a processor, not of the clock; it takes under one


def commands(group: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command of a group by its words, groups included."""
    found = {path: group}
    for name, command in getattr(group, "commands", {}).items():
        found |= commands(command, (*path, name))
    return found


COMMANDS = commands(typer.main.get_command(app))


def test_commands_are_those_of_the_readme() -> None:
    assert {path[0] for path in COMMANDS if path} >= {"train", "prepare", "export", "report", "demo", "bench"}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_help(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = COMMANDS[path]
    assert command.help
    assert [option.name for option in command.params if not getattr(option, "help", None)] == []
    monkeypatch.setattr(sys, "argv", ["mtraining", *path, "--help"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Usage: " in told
    assert " ".join(command.help.split()).split(".")[0] in told


def test_help_is_quick_because_it_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['mtraining', '--help']\n"
        "from mtraining.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "sys.exit(' '.join({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)) or 0)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run_command([sys.executable, "-c", code])  # what it loaded would stand in stderr
    assert "prepare" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < HELP_SECONDS


def test_every_module_imports() -> None:
    lacking = {}
    names = [module.name for module in pkgutil.walk_packages(mtraining.__path__, "mtraining.")]
    assert len(names) > 60
    for name in names:
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            lacking[name] = (error.name or "").partition(".")[0]
    assert {name: absent for name, absent in lacking.items() if absent not in OPTIONAL} == {}


def test_public_names_exist() -> None:
    for name in mtraining.__all__:
        assert getattr(mtraining, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'sparse_ring_atention'"):
        _ = mtraining.sparse_ring_atention
