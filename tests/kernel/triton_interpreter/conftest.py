"""These tests need a process that imports Triton with TRITON_INTERPRET=1; tests/kernel/test_triton.py starts one."""

from __future__ import annotations

import dataclasses
import functools
import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    from triton.runtime import interpreter

    # Half of Triton 3.6's time would go into two things that no test sees. It puts its own functions into
    # triton.language anew at each call of a device function, and takes them out after each launch: once per
    # function, for good, is enough.
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)
    interpreter._LangPatchScope.restore = lambda scope: None  # type: ignore[method-assign]
    # And it computes every sum of integers twice, for a check of overflow that it throws away unless
    # options.debug is set.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


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
