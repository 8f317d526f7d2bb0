"""CONTRIBUTING.md tells the truth: its steps for a pattern and a layout work, followed in a copy of the source."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from processes import run_command

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

# Attention under the new pattern's index equals plain attention under its mask.
PATTERN = """
import torch
from mtraining import build_pattern, sparse_ring_attention
from mtraining.pattern import SequenceShard

pattern = build_pattern("strided", block_size=8, step=3)
q, k, v = (torch.randn(1, 64, 2, 16, dtype=torch.float64) for _ in range(3))
out, index = sparse_ring_attention(q, k, v, pattern=pattern, layout="contiguous", mesh=None, return_index=True)
mask = index.to_mask()
assert 0 < mask.double().mean() < torch.ones(64, 64).tril().mean()
expected = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask
).transpose(1, 2)
assert torch.allclose(out, expected)
"""
LAYOUT = """
from mtraining.layout import build_layout

positions = build_layout("mirrored", 2).positions(16, 2).tolist()
assert positions == [[0, 1, 6, 7, 8, 9, 14, 15], [2, 3, 4, 5, 10, 11, 12, 13]]
"""


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)^## ", TEXT, flags=re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]


def follow(text: str, root: Path) -> None:
    """Do what the blocks of a section say: write files, and change lines of files that are there."""
    for language, name, body in re.findall(
        r"^```(python|diff)\n ?# (\S+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL
    ):
        path = root / name
        if language == "python":
            assert not path.exists()
            path.write_text(body, encoding="utf-8")
            continue
        lines, at = path.read_text(encoding="utf-8").splitlines(), 0
        for line in body.splitlines():
            sign, rest = line[0], line[1:]
            if sign == "+":
                lines.insert(at, rest)
                at += 1
                continue
            assert lines.count(rest) == 1, f"{name} has no single line {rest!r}"
            at = lines.index(rest)
            if sign == "-":
                del lines[at]
            else:
                at += 1
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(root: Path, *words: str) -> None:
    env = os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'tests'}"}
    run_command([sys.executable, *words], cwd=root, env=env)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The source and the tests, to change."""
    for folder in ("src", "tests"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_adding_a_pattern(copy: Path) -> None:
    follow(section("To add a pattern"), copy)
    run(copy, "-c", PATTERN)
    chosen = "no_pattern_is_left_out or ((sees_itself or full_budget or selection) and strided)"
    run(
        copy,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/pattern/test_every_pattern.py",
        "-k",
        chosen,
    )


@pytest.mark.slow
def test_adding_a_layout(copy: Path) -> None:
    follow(section("To add a layout"), copy)
    run(copy, "-c", LAYOUT)
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/layout/test_layouts.py")


def test_lint_passes_what_the_steps_write(copy: Path) -> None:
    """An example that lint refuses would be a bad one to copy."""
    for title in ("To add a pattern", "To add a layout"):
        follow(section(title), copy)
    for words in (("check",), ("format", "--check")):
        run(copy, "-m", "ruff", *words, "src/mtraining/pattern", "src/mtraining/layout")


def test_what_lint_runs_is_what_pre_commit_runs() -> None:
    """One list, in two files."""
    target = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert target is not None
    made = {line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in target[1].splitlines()}
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(hooks) == made
