"""These tests need a process that imports Triton with TRITON_INTERPRET=1; tests/kernel/test_triton.py starts one."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton 3.6's interpreter reads loop bounds through a conversion that NumPy has deprecated."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, or a number far out of range, so that an entry nobody wrote is seen."""
    plain = torch.empty

    def poison(*args: object, **options: object) -> Tensor:
        x: Tensor = plain(*args, **options)  # type: ignore[call-overload]
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(torch.int32).max // 2)

    monkeypatch.setattr(torch, "empty", poison)
