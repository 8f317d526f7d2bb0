"""The scripts of the study are a folder beside the package."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

STUDY = Path(__file__).parents[2] / "recipes" / "study"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY))


@pytest.fixture
def study_main(scripts: None) -> ModuleType:
    """The command's own module, which is not to be imported by its name."""
    spec = importlib.util.spec_from_file_location("study_main", STUDY / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
