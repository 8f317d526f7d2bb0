"""README tells the truth: each command is run by CI or by a test, each Python snippet runs, each file exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()

# A command of README that CI does not run itself, and the test that runs it instead.
RUN_BY_TEST = {
    "mtraining bench tiles": "tests/kernel/triton_interpreter/test_tiles_command.py::test_the_command",
    "mtraining bench train": "tests/bench/test_train_bench.py::test_the_command",
    "mtraining train recipes/qwen2.5-3b-512k.yaml --dry-run --memory-gib 80": (
        "tests/train/test_memory.py::test_readmes_dry_run"
    ),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [
        shlex.join(shlex.split(line, comments=True)) for line in lines if shlex.split(line, comments=True)
    ]


def run_by_ci(command: str) -> bool:
    return any(line in (command, f"step {command}") for line in CI.splitlines())


def test_readme_has_its_two_commands() -> None:
    assert commands()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", commands())
def test_command_is_run_by_ci_or_by_a_test(command: str) -> None:
    if command not in RUN_BY_TEST:
        assert run_by_ci(command), f"neither .ci/run nor RUN_BY_TEST runs `{command}`"
        return
    file, _, name = RUN_BY_TEST[command].partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), flags=re.MULTILINE), (
        f"{file} has no {name}"
    )


def test_a_command_that_nothing_runs_is_noticed() -> None:
    assert not run_by_ci("make coffee")
    assert not run_by_ci("make")


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_snippet_runs(number: int) -> None:
    scope: dict[str, Any] = {}
    exec(compile(blocks("python")[number], f"README snippet {number + 1}", "exec"), scope)


def test_files_that_readme_names_exist() -> None:
    linked = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    named = re.findall(r"`((?:src|docs|tests|recipes|benchmarks)/[\w./-]+)`", README)
    assert linked and named
    assert [path for path in [*linked, *named] if not (ROOT / path).exists()] == []
