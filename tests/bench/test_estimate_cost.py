"""The benchmark of estimates: it measures every pattern, and nothing that is wrong."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mtraining.kernel import ReferenceBackend, SparseIndex
from mtraining.pattern import PATTERNS, MoBA

HEADS = (2, 1, 16)


@pytest.fixture
def bench(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    estimate_cost = script("estimate_cost")
    monkeypatch.setattr(estimate_cost, "SMALL", 512)
    return estimate_cost


def test_every_estimated_pattern_is_gated_then_timed_phase_by_phase(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTRAINING_COMMIT", "abc")
    monkeypatch.setattr(bench, "measure", lambda run, device, seconds: (run(), Timed())[1])
    out = tmp_path / "cost.csv"
    arguments = [
        "--tokens",
        "256",
        "512",
        "--heads",
        *map(str, HEADS),
        "--block-size",
        "32",
        "--out",
        str(out),
    ]
    bench.main([*arguments, "--device", "cpu"])
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert {row["pattern"].split(",")[0].split()[0] for row in rows} == set(PATTERNS) - {
        "dense", "toeplitz_random", "per_head"
    }  # fmt: skip
    assert {(row["tokens"], row["ms"], row["commit"]) for row in rows} == {
        (n, "1.5", "abc") for n in ("256", "512")
    }
    by_probe = [row["phase"] for row in rows if row["tokens"] == "256" and "spread 256" in row["pattern"]]
    assert by_probe == ["estimate", "probe_lse", "probe_mass", "select"]


class Timed:
    ms, peak_mib = 1.5, None


def test_a_wrong_index_is_not_timed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    moba = bench.patterns(32)["moba"]
    given = (HEADS, ReferenceBackend(), torch.device("cpu"), torch.float64)
    assert bench.check("moba", moba, *given) < 0.01
    estimate = MoBA.estimate

    def wrong(self: MoBA, q: Any, *rest: Any) -> SparseIndex:
        index = estimate(self, q, *rest)
        return index if q.dtype == torch.float32 else replace(index, diagonals=~index.diagonals)

    monkeypatch.setattr(MoBA, "estimate", wrong)
    with pytest.raises(SystemExit, match="moba: wrong, nothing was timed"):
        bench.check("moba", moba, *given)
