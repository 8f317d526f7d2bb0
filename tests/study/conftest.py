"""The scripts of the study are a folder beside the package."""

from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "recipes" / "study"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDY))
