"""The benchmark of decode attention: its arithmetic, its gate, and its file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mtraining.bench.decode import run as module
from mtraining.bench.timing import Timing
from mtraining.cli import app
from mtraining.errors import UserError
from mtraining.kernel.reference.decode import decode_attention

CASE = module.Case(batch=2, q_heads=4, kv_heads=2, head_dim=64, tokens=256)


def test_shares_are_of_a_measured_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTRAINING_COMMIT", "abc123")

    def half_a_millisecond(run: Callable[[], object], *_: object) -> Timing:
        run()
        return Timing(0.5, None)

    monkeypatch.setattr(module, "measure", half_a_millisecond)
    rows, path, wrong = module.bench("", "fp32", "cpu", tmp_path, cases=[CASE], say=lambda text: None)
    (row,) = rows
    assert wrong == [] and path is not None
    assert row.gb_s == pytest.approx(2 * 2 * 2 * 256 * 64 * 4 / 0.5e-3 / 1e9)  # keys and values, read once
    assert row.copy_gb_s == pytest.approx(2 * (1 << 24) / 0.5e-3 / 1e9)  # read and written
    assert row.share == pytest.approx(row.gb_s / row.copy_gb_s)
    with path.open(encoding="utf-8") as file:
        (written,) = csv.DictReader(file)
    assert written["tokens"] == "256" and written["commit"] == "abc123"


@pytest.mark.parametrize("fault", ["out", "lse"])
def test_a_wrong_kernel_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def wrong(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        out, lse = decode_attention(q, *rest)  # type: ignore[arg-type]
        return (out * 1.01, lse) if fault == "out" else (out, lse + 0.01)

    monkeypatch.setenv("MTRAINING_COMMIT", "abc123")
    monkeypatch.setattr(module, "select_decode", lambda *_: wrong)
    rows, path, told = module.bench("", "fp32", "cpu", tmp_path, cases=[CASE], say=lambda text: None)
    assert rows == [] and path is None and len(told) == 1
    assert ("relative error" if fault == "out" else "error of lse") in told[0]


def test_the_gate_sees_keys_past_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def past(
        q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, longest: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        return decode_attention(q, k, v, torch.full_like(lengths, longest), longest, scale)

    assert module.check(CASE, torch.float32, torch.device("cpu")) is None
    monkeypatch.setattr(module, "select_decode", lambda *_: past)
    assert module.check(CASE, torch.float32, torch.device("cpu")) is not None


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTRAINING_COMMIT", "abc123")
    done = CliRunner().invoke(
        app, ["bench", "decode", "--dtype", "fp32", "--device", "cpu", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    assert "share of a copy" in done.output and len(list(tmp_path.glob("decode-*.csv"))) == 1


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype int8 is not known; choose one of bf16"):
        module.bench("", "int8", "cpu", tmp_path)
    with pytest.raises(UserError, match="--preset huge is not known"):
        module.bench("huge", "fp32", "cpu", tmp_path)
