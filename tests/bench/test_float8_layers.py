"""Timing linear layers in float8: what is compared before it is timed, on a CPU in emulation."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def run(bench: Any, path: Path) -> int:
    return int(
        bench.main(["--out", str(path), "--device", "cpu", "--tokens", "64", "--shapes", "64x96", "96x32"])
    )


@pytest.mark.slow
def test_every_form_is_near_fp32_and_timed(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    bench: Any = script("float8_layers")
    assert run(bench, tmp_path / "x.csv") == 0
    found = rows(tmp_path / "x.csv")
    assert [row["form"] for row in found] == 2 * list(bench.FORMS)
    assert all(float(row["both_ms"]) > 0 for row in found)
    for row in found:
        assert (float(row["error"]) > 0.01) == (row["form"] != "bf16"), "float8 rounds, and bf16 hardly"


@pytest.mark.slow
def test_a_layer_that_is_wrong_is_not_timed(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    bench: Any = script("float8_layers")
    plain = bench.results

    def transposed(layer: Any, x: Any, grad: Any, weight: Any) -> Any:
        y, dx, dw = plain(layer, x, grad, weight)
        return [y, dx, dw * (1 if x.dtype.itemsize == 4 else 1.1)]

    monkeypatch.setattr(bench, "results", transposed)
    assert run(bench, tmp_path / "x.csv") == 1
    assert all(row["both_ms"] == "" for row in rows(tmp_path / "x.csv"))
