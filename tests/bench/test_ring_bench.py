"""`mtraining bench ring`: a gate before every number, the columns of its CSV, and its own processes."""

from __future__ import annotations

import csv
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed import ProcessPool, Worker
from mtraining.bench.options import RingOptions
from mtraining.bench.ring import run as ring_bench
from mtraining.errors import UserError
from mtraining.ring import attention

COLUMNS = (
    "date commit gpu gpus ranks torch seq_len density columns ring forward_ms backward_ms efficiency peak_gib "
    "exposed_fraction"
).split()
TINY = replace(ring_bench.ON_CPUS, tokens=(512,), density=0.6, columns=16, gate_tokens=256)


def run(worker: Worker, out: Path, wrong: bool) -> tuple[bool, list[str]]:
    """One rank of a run in the pool: whether the gate was passed, and what was said."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTRAINING_COMMIT", "abc123")
        patch.setattr(ring_bench, "_ROUNDS", 2)
        patch.setattr(ring_bench, "GATE_HEADS", ((4, 2, 16),))
        if wrong:
            whole = attention.ring_backward

            def short(*args: Any) -> Any:  # key gradients of the last rank are a little short
                dq, dkv = whole(*args)
                dkv[0] *= 0.9 if worker.rank == 1 and args[-1].plan.ring.world > 1 else 1.0
                return dq, dkv

            patch.setattr(attention, "ring_backward", short)
        right = ring_bench.run(torch.device("cpu"), out, TINY, said.append)
    return right, said


def test_a_right_ring_is_timed_beside_one_process(pool: ProcessPool, tmp_path: Path) -> None:
    (right, said), (same, silent) = pool.run(run, 2, out=tmp_path, wrong=False)
    assert right and same and "right" in said and silent == []
    (path,) = tmp_path.glob("ring-*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [(row["ring"], row["ranks"], row["seq_len"]) for row in rows] == [
        ("none", "1", "512"),
        ("flat", "2", "512"),
    ]
    alone, ring = ([float(row[name]) for name in ("forward_ms", "backward_ms")] for row in rows)
    assert float(rows[1]["efficiency"]) == pytest.approx(sum(alone) / 2 / sum(ring), rel=0.05)


def test_a_wrong_ring_gets_no_number(pool: ProcessPool, tmp_path: Path) -> None:
    (right, said), (same, _) = pool.run(run, 2, out=tmp_path, wrong=True)
    assert not right and not same
    assert said[-1] == "WRONG: no number is reported" and list(tmp_path.iterdir()) == []


def test_columns_are_those_of_earlier_files() -> None:
    assert [field.name for field in fields(ring_bench.RingRow)] == COLUMNS


def test_it_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started = []
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(ring_bench, "start", lambda *args: started.append(args) or 0)
    assert ring_bench.main(["--device", "cpu", "--nproc", "3", "--out", str(tmp_path)]) == 0
    assert started == [("mtraining.bench.ring", ["--device=cpu", "--nproc=3", f"--out={tmp_path}"], 3, False)]


def test_bad_input_is_refused_before_anything_starts() -> None:
    with pytest.raises(UserError, match="device: 'tpu' is not known"):
        ring_bench.bench(RingOptions(device="tpu"))
    assert ring_bench.main(["--device", "cuda", "--nproc", "64"]) == 2


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """`mtraining bench ring` from start to end, on two processes."""
    from typer.testing import CliRunner

    from mtraining.cli import app

    result = CliRunner().invoke(app, ["bench", "ring", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("ring-cpu-*.csv")
    assert len(path.read_text().splitlines()) == 1 + 2 * len(ring_bench.ON_CPUS.tokens)
