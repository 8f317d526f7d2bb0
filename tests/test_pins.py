"""The pinned versions are those of pyproject.toml: who changes a range or adds a package runs `make update` too."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
APART = {"torch", "triton"}  # which build suits depends on the machine
EXTRAS = ("report", "docs", "dev", "liger")


def asked() -> dict[str, Requirement]:
    """What pyproject.toml asks for, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(x for e in EXTRAS for x in project["optional-dependencies"][e])]
    found = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    return {name: each for name, each in found.items() if name not in {*APART, "mtraining"}}


def pinned(name: str) -> dict[str, list[Requirement]]:
    """The lines of a file of requirements/, by name: one, or one for each of several Pythons."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        each = Requirement(line)
        found.setdefault(canonicalize_name(each.name), []).append(each)
    return found


@pytest.mark.parametrize("name", ["pinned", "oldest"])
def test_every_package_is_pinned_within_its_range(name: str) -> None:
    pins = pinned(name)
    assert [each for each in asked() if each not in pins] == []
    for package, lines in pins.items():
        for line in lines:
            (exact,) = line.specifier
            assert exact.operator == "==" and line.url is None, f"{line} is no exact version"
            if package in asked():
                assert asked()[package].specifier.contains(exact.version), f"{line}: not {asked()[package]}"


@pytest.mark.parametrize("name", ["pinned", "oldest"])
def test_what_depends_on_the_machine_is_left_out(name: str) -> None:
    assert [x for x in pinned(name) if x in APART or x.startswith(("nvidia-", "cuda-"))] == []


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    pins = pinned("oldest")
    for package, wanted in asked().items():
        lowest = [x.version for x in wanted.specifier if x.operator == ">="]
        (line,) = pins[package]
        assert lowest, f"{wanted} has no lower bound"
        # 4 is 4.0.0.
        assert line.specifier.contains(lowest[0]), f"{line} is not the oldest of {wanted}"
