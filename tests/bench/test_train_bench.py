"""The training benchmark on a CPU: what it writes, that nothing wrong gets a number, how it goes on after a crash."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from distributed import ProcessPool, Worker
from memory_limits import limited
from mtraining.bench.options import TrainOptions
from mtraining.bench.record import Provenance
from mtraining.bench.train import gate as train_gate
from mtraining.bench.train import model as train_model
from mtraining.bench.train import worker as train_worker
from mtraining.bench.train.cases import SHAPES, TrainCase, parse_tokens
from mtraining.bench.train.progress import Effort, Progress
from mtraining.bench.train.record import TrainRow, draw
from mtraining.bench.train.run import cases_of, check
from mtraining.cli import app
from mtraining.errors import UserError
from mtraining.pattern import Dense, VerticalSlash
from mtraining.predict.recompute import policies_text
from mtraining.ring import attention
from mtraining.sizes import tokens_text

TOLD = Provenance("2026-01-01", "abc123", "cpu test", torch.__version__, "none")
TINY = SHAPES["tiny"]
DENSE = TrainCase(TINY, 128, None, "zigzag", "flat", "keep_attention", 2)
SPARSE = TrainCase(TINY, 128, 0.6, "striped", "flat", "keep_attention", 2)
ONCE = Effort(warmup=1, steps=1)
WANTED = (
    "date commit gpu gpus model seq_len density pattern layout ring recompute step_seconds tokens_per_second "
    "dense_step_seconds speedup peak_gib ring_exposed_fraction"
).split()


def run(worker: Worker, cases: list[TrainCase], path: Path, break_what: str = "") -> dict[str, Any]:
    """One rank of a run in the pool; every rank returns what the file says."""
    with pytest.MonkeyPatch.context() as patch:
        break_step(patch, break_what)
        progress = Progress(path)
        torch.distributed.barrier()
        cpu = torch.device("cpu")
        train_worker.run_cases(cases, ONCE, cpu, TOLD, progress, say=lambda text: None)
        torch.distributed.barrier()
        found = Progress(path)
    return {"rows": found.rows, "failures": found.failures, "notes": found.notes, "ended": found.ended}


def break_step(patch: pytest.MonkeyPatch, what: str) -> None:
    if what == "ring":  # where there are several ranks, key gradients are a little short
        whole = attention.ring_backward

        def wrong(*args: Any) -> Any:
            dq, dkv = whole(*args)
            dkv[0] *= 0.9 if args[-1].plan.ring.world > 1 else 1.0
            return dq, dkv

        patch.setattr(attention, "ring_backward", wrong)
    if what == "pattern":  # the timed pattern is not the prescribed one
        real_pattern = TrainCase.pattern

        def pattern(case: TrainCase, *, estimate: bool = True) -> Any:
            return Dense(16) if estimate else real_pattern(case, estimate=False)

        patch.setattr(TrainCase, "pattern", pattern)
    if what == "memory":
        real = train_model.stepper

        def stepper(case: TrainCase, *args: Any) -> Any:
            if case.density is None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            return real(case, *args)

        patch.setattr(train_worker, "stepper", stepper)


@pytest.mark.slow
def test_rows_of_two_ranks_with_their_dense_step(pool: ProcessPool, tmp_path: Path) -> None:
    other = replace(SPARSE, layers=1)  # no dense step like it in the run
    found = pool.run(run, 2, cases=[DENSE, SPARSE, other], path=tmp_path / "p")[0]
    assert found["failures"] == [] and found["notes"] == [] and found["ended"] == {0, 1, 2}
    dense, sparse, alone = found["rows"]
    assert dense.density == 1 and dense.pattern == "dense" and sparse.pattern == "toeplitz_random"
    assert sparse.density == pytest.approx(0.6, abs=0.05)
    assert sparse.dense_step_seconds == dense.step_seconds > 0
    assert sparse.speedup == pytest.approx(dense.step_seconds / sparse.step_seconds)
    assert sparse.tokens_per_second == pytest.approx(128 / sparse.step_seconds)
    assert sparse.gpus == 2 and 0 < sparse.ring_exposed_fraction < 1 and sparse.estimate_seconds > 0
    assert 0 < alone.predicted_gib < sparse.predicted_gib < 1
    assert alone.speedup is None and alone.dense_step_seconds is None


@pytest.mark.slow
def test_four_ranks_as_a_ring_of_rings(pool: ProcessPool, tmp_path: Path) -> None:
    cases = [replace(SPARSE, ring="2x2"), replace(SPARSE, ring="2x1")]
    found = pool.run(run, 4, cases=cases, path=tmp_path / "p")[0]
    assert [row.ring for row in found["rows"]] == ["2x2"]
    assert len(found["notes"]) == 1 and "2x1 is a ring of 2 ranks, and there are 4" in found["notes"][0]


@pytest.mark.parametrize("what", ["ring", "pattern"])
def test_nothing_wrong_gets_a_number(pool: ProcessPool, tmp_path: Path, what: str) -> None:
    found = pool.run(run, 2, cases=[SPARSE], path=tmp_path / "p", break_what=what)[0]
    assert found["rows"] == [] and len(found["failures"]) == 1
    assert "gradient of" in found["failures"][0] or "loss" in found["failures"][0]


def test_steps_in_float8_with_moments_in_8_bits_are_gated_against_emulated_products(
    pool: ProcessPool, tmp_path: Path
) -> None:
    case = replace(SPARSE, float8="emulated", optimizer_state="8bit")
    found = pool.run(run, 2, cases=[case], path=tmp_path / "p")[0]
    assert found["failures"] == []
    assert [(row.float8, row.optimizer_state) for row in found["rows"]] == [("emulated", "8bit")]


def test_a_rank_alone_goes_on_after_running_out_of_memory(pool: ProcessPool, tmp_path: Path) -> None:
    found = pool.run(run, 1, cases=[DENSE, SPARSE], path=tmp_path / "p", break_what="memory")[0]
    assert "out of memory on rank 0: CUDA out of memory" in found["notes"][0]
    assert [row.pattern for row in found["rows"]] == ["toeplitz_random"]


@pytest.mark.slow
def test_ranks_started_again_go_on_after_the_case_that_ended_them(pool: ProcessPool, tmp_path: Path) -> None:
    path = tmp_path / "p"
    with pytest.raises(torch.OutOfMemoryError):
        pool.run(run, 2, cases=[DENSE, SPARSE], path=path, break_what="memory")
    assert Progress(path).ended == {0} and Progress(path).rows == []
    found = pool.run(run, 2, cases=[DENSE, SPARSE], path=path, break_what="memory")[0]
    assert [row.pattern for row in found["rows"]] == ["toeplitz_random"]
    assert all("out of memory on rank" in note for note in found["notes"])


def test_a_case_that_killed_its_processes_is_noted_and_passed_over(pool: ProcessPool, tmp_path: Path) -> None:
    Progress(tmp_path / "p").tell(begin=0)
    found = pool.run(run, 2, cases=[DENSE, SPARSE], path=tmp_path / "p")[0]
    assert "ended the processes" in found["notes"][0] and found["ended"] == {0, 1}
    assert [row.pattern for row in found["rows"]] == ["toeplitz_random"]


def count_estimates(worker: Worker) -> tuple[int, int]:
    counted = []
    real = VerticalSlash.estimate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VerticalSlash, "estimate", lambda self, *args: counted.append(1) or real(self, *args))
        process = train_model.process_for(SPARSE, torch.device("cpu"), worker.rank, worker.world)
        model = train_model.parallel(SPARSE, train_model.build_model(TINY, 128, 2, process.device), process)
        data = train_model.batches(SPARSE, train_model.random_sequences(256, 128), process)
        train_model.stepper(SPARSE, model, process).run(data, 0)
        return len(counted), SPARSE.layers


def scarce(worker: Worker, path: Path) -> tuple[Any, dict[str, Any]]:
    """Job: a case with recompute=auto where memory is scarce."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = limited(patch, train_worker, 0.4)
        return chosen, run(worker, [replace(SPARSE, recompute="auto", layers=4)], path)


def test_what_auto_chose_passes_the_gate_and_is_timed(pool: ProcessPool, tmp_path: Path) -> None:
    chosen, found = pool.run(scarce, 2, path=tmp_path / "p")[0]
    assert len(chosen) == 1 and len(set(chosen[0])) > 1
    assert found["failures"] == [] and found["notes"] == [], found
    assert [row.recompute for row in found["rows"]] == ["auto"]
    assert [row.kept for row in found["rows"]] == [policies_text(chosen[0])]
    kinds = tuple(dict.fromkeys(chosen[0]))
    small = train_gate.shortened(replace(SPARSE, recompute="auto", layers=4, policies=tuple(chosen[0])), 2)
    assert small.policies == kinds and small.layers == len(kinds)
    alike = replace(SPARSE, recompute="auto", policies=chosen[0][:1] * 4)
    assert train_gate.shortened(alike, 2).policies == chosen[0][:1] * 2


def test_every_layer_of_the_timed_step_estimates_once(pool: ProcessPool) -> None:
    assert pool.run(count_estimates, 1) == [(2, 2)]


def test_comparison_notices_nan_and_a_missing_gradient() -> None:
    truth = {"a": torch.ones(3), "b": torch.zeros(3)}
    train_gate.compare(1.0, truth, 1.0, truth, 1e-5, 1e-4)
    for gradients in ({"a": torch.full((3,), torch.nan), "b": truth["b"]}, {"a": truth["a"]}):
        with pytest.raises(train_gate.GateError, match="gradient"):
            train_gate.compare(1.0, gradients, 1.0, truth, 1e-5, 1e-4)
    with pytest.raises(train_gate.GateError, match="loss"):
        train_gate.compare(float("nan"), truth, 1.0, truth, 1e-5, 1e-4)


def test_cases_vary_one_option_at_a_time() -> None:
    chosen = TrainOptions(preset="table", seq_len=("128K",), density=(0.2, 0.1), ring=("flat",), layers=4)
    cases = cases_of(chosen)
    assert [(case.density, case.layout) for case in cases] == [
        (None, "zigzag"),
        (0.2, "striped"),
        (0.1, "striped"),
        (0.2, "zigzag"),
        (0.2, "contiguous"),
    ]
    assert {case.layers for case in cases} == {4} and {case.seq_len for case in cases} == {131072}
    everything = cases_of(TrainOptions(preset="table"))
    assert {(tokens_text(case.seq_len), case.layers) for case in everything if case.density is None} == {
        ("512K", 36), ("128K", 36), ("256K", 36), ("1M", 4),
    }  # fmt: skip
    for case in everything:
        case.pattern()


def test_the_prescribed_index_has_the_density_asked_for() -> None:
    for case in cases_of(TrainOptions(preset="table")):
        if case.density is not None and case.seq_len <= 131072:
            assert train_worker._density(case, torch.device("cpu")) == pytest.approx(case.density, rel=0.01)
            assert case.shape.window == 8 and case.pattern().with_estimation  # type: ignore[attr-defined]


def test_optimisation_is_the_trainers_own() -> None:
    from mtraining.train.config import TrainSection

    ours, theirs = train_model.Optimisation(256, 5), TrainSection(seq_len=256, steps=5)
    assert asdict(ours) == {field.name: getattr(theirs, field.name) for field in fields(ours)}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"preset": "large"}, "preset: 'large' is not known; choose one of"),
        ({"model": "gpt"}, "model: 'gpt' is not known"),
        ({"seq_len": ("12X",)}, "seq-len: '12X' is not a number of tokens"),
        ({"layout": ("random",)}, "layout: 'random' is not known"),
        ({"ring": ("2by2",)}, "ring: '2by2' is not known"),
        ({"recompute": ("some",)}, "recompute: 'some' is not known"),
        ({"density": (5.0,)}, "density: 5.0 must be a share"),
        ({"layers": 0}, "layers=0"),
        ({"steps": 0}, "steps=0"),
        ({"device": "tpu"}, "device: 'tpu' is not known"),
        ({"device": "cuda", "nproc": 64}, "nproc: 64 processes want a GPU each"),
        ({"fused": "liger"}, "fused: liger needs an NVIDIA GPU"),
        ({"float8": "rowwise"}, "train.float8=rowwise needs an NVIDIA GPU"),
        ({"optimizer_state": "4bit"}, "optimizer_state: '4bit' is not known"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check(TrainOptions(**{"device": "cpu", **options}))


def test_lengths_are_written_and_read() -> None:
    assert [parse_tokens(text) for text in ("512K", "1m", "300")] == [524288, 1048576, 300]
    assert [tokens_text(number) for number in (524288, 1048576, 300)] == ["512K", "1M", "300"]


def test_a_chart_has_a_bar_for_each_row(tmp_path: Path) -> None:
    values = {field.name: "x" for field in fields(TrainRow)} | {"seq_len": 1024, "density": 0.05, "layers": 2}
    row = TrainRow(**{**values, "step_seconds": 2.0, "speedup": 6.5, "gpus": 4})  # type: ignore[arg-type]
    draw([replace(row, pattern="dense", step_seconds=13.0), row], tmp_path / "c.svg")
    drawn = (tmp_path / "c.svg").read_text()
    assert "<svg" in drawn and "6.5x" in drawn and "13 s" in drawn


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mtraining bench train` of README, on processes that need no package of the command line."""
    for missing in ("pydantic", "typer", "datasets"):
        (tmp_path / "lacking").mkdir(exist_ok=True)
        (tmp_path / "lacking" / f"{missing}.py").write_text("raise ModuleNotFoundError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lacking"))
    monkeypatch.setenv("MTRAINING_COMMIT", "abc123")
    chart = tmp_path / "chart.svg"
    options = ["--device", "cpu", "--layout", "striped", "--steps", "1"]  # of README's, the first half
    told = CliRunner().invoke(
        app, ["bench", "train", "--out", str(tmp_path), "--chart", str(chart), *options]
    )
    assert told.exit_code == 0, told.output
    (path,) = tmp_path.glob("train-*.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert set(WANTED) <= set(rows[0]) and chart.exists()
    assert [row["layout"] for row in rows] == ["zigzag", "striped"]
    assert all(float(row["step_seconds"]) > 0 and row["commit"] == "abc123" for row in rows)
    assert "speedup" in told.output and str(path) in told.output.replace("\n", "")
