"""These tests need a process that imports Triton with TRITON_INTERPRET=1; tests/kernel/test_triton.py starts one."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton 3.6's interpreter reads loop bounds through a conversion that NumPy has deprecated."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"))
