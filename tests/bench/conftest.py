"""The scripts of benchmarks/ are a folder beside the package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script by its name. Scripts may import one another."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module
