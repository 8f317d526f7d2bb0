"""Whole runs: resume, reshard, accumulation, and what happens when a step or a save goes wrong."""

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import differing, raw_config, run_job, tiny_config
from torch.distributed.checkpoint import FileSystemWriter

import mtraining.train.loop as loop
from distributed import ProcessPool, Worker
from mtraining.errors import RunStopped, UserError
from mtraining.train.config import parse_config
from mtraining.train.export import export_run
from mtraining.train.metrics import read_metrics
from mtraining.train.store import CheckpointStore


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pool: ProcessPool, shards: Path) -> Path:
    """A finished run of six steps on cp 2, with checkpoints after steps 3 and 6."""
    folder = tmp_path_factory.mktemp("run")
    raw = raw_config(folder, shards, parallel={"cp": 2}, log={"every": 3, "recall_rows": 16})
    pool.run(run_job, world=2, raw=raw)
    return folder


def interrupted(run: Path, to: Path) -> Path:
    """The run as it was after a crash between steps 5 and 6: half a checkpoint, and metrics ahead of the last one."""
    shutil.copytree(run, to)
    store = CheckpointStore(to)
    store.path(6).rename(store.partial(6))
    (store.partial(6) / "manifest.json").unlink()
    lines = (to / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (to / "metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:20], encoding="utf-8")
    return to


def test_metrics_hold_what_was_asked(run: Path) -> None:
    records = read_metrics(run)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["lr"] > 0 for record in records] == [False] + 5 * [True]  # the warm-up begins at zero
    for key in ("loss", "grad_norm", "tokens_per_second", "step_seconds", "memory"):
        assert all(record[key] > 0 for record in records), key
    observed = records[2]
    assert len(observed["layer_density"]) == 2
    assert observed["density"] == pytest.approx(sum(observed["layer_density"]) / 2)
    assert observed["density"] > 0
    assert 0 < observed["recall"] <= 1 + 1e-6  # the ratio of two sums, each rounded
    assert observed["recall"] == pytest.approx(sum(observed["layer_recall"]) / len(observed["layer_density"]))
    assert observed["worker_imbalance"] >= 1
    assert observed["step_imbalance"] >= 1
    assert "density" not in records[1]
    assert 0 < observed["ring_exposed_fraction"] <= observed["ring_exposed_fraction_max"] < 1
    for phase in ("forward", "backward"):
        assert len(observed[f"ring_{phase}_compute"]) == len(observed[f"ring_{phase}_exposed"]) == 2
        assert all(seconds > 0 for seconds in observed[f"ring_{phase}_compute"])
    assert not any(key.startswith("ring_") for key in records[1])
    assert records[5]["loss"] < records[0]["loss"]


def test_resume_is_bit_for_bit(run: Path, tmp_path: Path, pool: ProcessPool, shards: Path) -> None:
    folder = interrupted(run, tmp_path / "again")
    raw = raw_config(folder, shards, parallel={"cp": 2})
    records = pool.run(run_job, world=2, raw=raw)[0]
    assert losses(records) == losses(read_metrics(run))
    assert [record["grad_norm"] for record in records] == [
        record["grad_norm"] for record in read_metrics(run)
    ]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert differing(CheckpointStore(run).path(6), CheckpointStore(folder).path(6), tmp_path) == []


def signalled_job(worker: Worker, raw: dict[str, Any]) -> tuple[str, int]:
    """A run whose last rank alone gets SIGTERM, amid its fourth step."""
    original = loop.parallel_model

    def build(config: Any, process: Any, *recompute: Any) -> Any:
        model = original(config, process, *recompute)
        forward, calls = model.forward, iter(range(10**6))

        def send(*args: Any, **options: Any) -> torch.Tensor:
            if next(calls) == 6 and worker.rank == worker.world - 1:  # two calls a step
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
            return forward(*args, **options)

        model.forward = send
        return model

    loop.parallel_model = build
    try:
        run_job(worker, raw)
    except RunStopped as error:
        return str(error), error.code
    finally:
        loop.parallel_model = original
    return "it went on", 0


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_rest_is_bit_for_bit(
    run: Path, tmp_path: Path, pool: ProcessPool, shards: Path
) -> None:
    store = CheckpointStore(tmp_path / "again")
    raw = raw_config(tmp_path / "again", shards, parallel={"cp": 2}, checkpoint={"every": 0})
    ends = pool.run(signalled_job, world=2, raw=raw)
    done = len(read_metrics(tmp_path / "again"))
    assert done in (4, 5)  # the step in progress; a slow machine may hear of it in the next one
    assert ends[0] == ends[1]
    assert ends[0] == (
        f"stopped by a signal after step {done}, saved in {store.path(done)}: run the same command again to go on "
        "from it.",
        75,
    )
    assert store.complete() == [store.path(done)]
    assert losses(pool.run(run_job, world=2, raw=raw)[0]) == losses(read_metrics(run))
    assert differing(CheckpointStore(run).path(6), store.path(6), tmp_path) == []


@pytest.mark.parametrize(
    "grid",
    [
        {"dp": 2},
        {"cp": 1},
        pytest.param({"cp": 4}, marks=[pytest.mark.slow, pytest.mark.sweep]),
        pytest.param({"cp": 4, "cp_outer": 2}, marks=pytest.mark.slow),
        pytest.param({"dp": 2, "cp": 2}, marks=[pytest.mark.slow, pytest.mark.sweep]),
    ],
)
def test_resume_on_another_grid(
    run: Path, tmp_path: Path, pool: ProcessPool, shards: Path, grid: dict[str, int]
) -> None:
    folder = interrupted(run, tmp_path / "again")
    raw = raw_config(folder, shards, parallel=grid)
    records = pool.run(run_job, world=grid.get("dp", 1) * grid.get("cp", 1), raw=raw)[0]
    assert losses(records) == pytest.approx(losses(read_metrics(run)), rel=1e-4)
    assert len(records) == 6


@pytest.mark.slow
def test_micro_batches_add_up_to_the_large_batch(tmp_path: Path, pool: ProcessPool, shards: Path) -> None:
    curves = []
    for micro in (1, 4):
        raw = raw_config(
            tmp_path / str(micro), shards, train={"micro_batch_size": micro}, pattern={"top_p": 1.0}
        )
        curves.append(pool.run(run_job, world=1, raw=raw)[0])
    small, large = curves
    assert losses(small) == pytest.approx(losses(large), rel=1e-5)
    assert [r["grad_norm"] for r in small] == pytest.approx([r["grad_norm"] for r in large], rel=1e-4)


def poison(rank: int, at_call: int, gradient: bool) -> None:
    """Make the model's loss (or only its gradient) NaN on one rank at one call."""
    original = loop.parallel_model

    def poisoned(config: Any, process: Any, *recompute: Any) -> Any:
        model = original(config, process, *recompute)
        forward, calls = model.forward, iter(range(10**6))

        def broken(*args: Any, **options: Any) -> torch.Tensor:
            loss = forward(*args, **options)
            if next(calls) == at_call and process.rank == rank:
                if gradient:
                    loss.register_hook(lambda grad: grad * float("nan"))
                else:
                    loss = loss * float("nan")
            return loss

        model.forward = broken
        return model

    loop.parallel_model = poisoned


def poisoned_job(worker: Worker, raw: dict[str, Any], gradient: bool) -> str:
    original = loop.parallel_model
    poison(rank=1, at_call=8, gradient=gradient)  # two calls a step: the first of step 5
    try:
        run_job(worker, raw)
    except UserError as error:
        return str(error)
    finally:
        loop.parallel_model = original
    return "it went on"


@pytest.mark.parametrize("gradient", [False, True])
def test_nan_stops_the_run_before_the_update(
    tmp_path: Path, pool: ProcessPool, shards: Path, gradient: bool
) -> None:
    raw = raw_config(tmp_path, shards, parallel={"cp": 2})
    first, second = pool.run(poisoned_job, world=2, raw=raw, gradient=gradient)
    assert first == second
    assert first.startswith(f"step 5: the {'gradient norm' if gradient else 'loss'} is nan on rank ")
    assert "document 'count" in first
    assert str(CheckpointStore(tmp_path).path(3)) in first
    if not gradient:
        assert "on rank 1, " in first
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert CheckpointStore(tmp_path).latest() == CheckpointStore(tmp_path).path(3)


def full_disk_job(worker: Worker, raw: dict[str, Any]) -> str:
    original = FileSystemWriter.write_data

    def refuse(self: FileSystemWriter, *args: Any) -> Any:
        if "step_00000006" in str(self.path) and worker.rank == worker.world - 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args)

    FileSystemWriter.write_data = refuse  # type: ignore[method-assign]
    try:
        run_job(worker, raw)
    except UserError as error:
        return str(error)
    finally:
        FileSystemWriter.write_data = original  # type: ignore[method-assign]
    return "saved"


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_costs_only_the_save_that_met_it(
    tmp_path: Path, pool: ProcessPool, shards: Path, asynchronous: bool
) -> None:
    raw = raw_config(tmp_path, shards, parallel={"cp": 2}, checkpoint={"async": asynchronous})
    sentences = pool.run(full_disk_job, world=2, raw=raw)
    store = CheckpointStore(tmp_path)
    for sentence in sentences:
        assert "the checkpoint of step 6 could not be saved" in sentence
        assert str(store.path(3)) in sentence
    assert store.complete() == [store.path(3)]
    assert not store.partial(6).exists()
    assert len(read_metrics(tmp_path)) == 6


def test_a_full_disk_midway_is_told_and_the_next_save_succeeds(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = FileSystemWriter.write_data

    def refuse(self: FileSystemWriter, *args: Any) -> Any:
        if "step_00000003" in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", refuse)
    loop.train(tiny_config(tmp_path, shards))
    told = [line for line in capsys.readouterr().out.splitlines() if "was not saved" in line]
    assert len(told) == 1
    assert "checkpoint of step 3 was not saved" in told[0]
    assert "the disk is full" in told[0]
    store = CheckpointStore(tmp_path)
    assert store.complete() == [store.path(6)]


def test_a_checkpoint_of_another_model_is_refused(
    run: Path, tmp_path: Path, pool: ProcessPool, shards: Path
) -> None:
    raw = raw_config(interrupted(run, tmp_path / "again"), shards, parallel={"cp": 2})
    raw["model"]["config"]["intermediate_size"] = 112
    with pytest.raises(
        UserError, match=r"is of another model: .*mlp.* has shape \(64, 96\) there and .* \(64, 112\) here"
    ):
        pool.run(run_job, world=2, raw=raw)


def test_a_finished_run_has_nothing_left_to_do(
    run: Path, tmp_path: Path, pool: ProcessPool, shards: Path
) -> None:
    shutil.copytree(run, tmp_path / "again")
    raw = raw_config(tmp_path / "again", shards, parallel={"cp": 2})
    assert losses(pool.run(run_job, world=2, raw=raw)[0]) == losses(read_metrics(run))


def exported_losses(worker: Worker, raw: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Train, export, and give the trained model's token losses on a fixed text together with that text."""
    kept: list[Any] = []
    original = loop.parallel_model

    def keep(config: Any, process: Any, *recompute: Any) -> Any:
        kept.append(original(config, process, *recompute))
        return kept[0]

    loop.parallel_model = keep
    try:
        loop.train(parse_config(raw))
    finally:
        loop.parallel_model = original
    tokens = torch.arange(257)[None] * 7 % 250
    batch = {"input_ids": tokens[:, :-1], "position_ids": torch.arange(256)[None], "labels": tokens[:, 1:]}
    with torch.no_grad():
        return kept[0].token_losses(batch["input_ids"], batch["position_ids"], batch["labels"]).clone(), batch


def test_the_export_loads_in_plain_transformers_and_agrees(
    tmp_path: Path, pool: ProcessPool, shards: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    raw = raw_config(tmp_path, shards, checkpoint={"export": True})
    raw["pattern"] = {"name": "dense", "block_size": 16}
    expected, batch = pool.run(exported_losses, world=1, raw=raw)[0]
    export_run(tmp_path, tmp_path / "later", checkpoint="step_00000006")
    for folder in (tmp_path / "export", tmp_path / "later"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits
        losses = torch.nn.functional.cross_entropy(logits[0], batch["labels"][0], reduction="none")
        torch.testing.assert_close(losses, expected[0], rtol=1e-4, atol=1e-4)
        assert len(AutoTokenizer.from_pretrained(folder)("abc")["input_ids"]) == 3


def test_export_refuses_what_is_no_run(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        export_run(tmp_path, tmp_path / "out")
    (tmp_path / "config.yaml").write_text(tiny_config(tmp_path, shards).to_yaml(), encoding="utf-8")
    with pytest.raises(UserError, match="no complete checkpoint"):
        export_run(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="--dtype int8"):
        export_run(tmp_path, tmp_path / "out", dtype="int8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "grid",
    [
        pytest.param({"cp": 2}, marks=pytest.mark.sweep),
        pytest.param({"dp": 2}, marks=pytest.mark.sweep),
        pytest.param({"dp": 2, "cp": 2}, marks=pytest.mark.sweep),
        {"cp": 4, "cp_outer": 2},
    ],
    ids=str,
)
def test_frozen_indices_survive_checkpoints_and_other_grids(
    tmp_path: Path, pool: ProcessPool, shards: Path, grid: dict[str, int]
) -> None:
    """Frozen at step 2, saved at step 3: a run that goes on from there attends as the one that was never stopped."""
    held: dict[str, Any] = {"refresh": {"frozen_at": 2}, "coverage": 8, "window": 3, "max_columns": 12}
    held |= {"top_p": 0.3, "slash_by": "block", "slash_density": 0.2}
    raw = raw_config(tmp_path / "a", shards, pattern=held, parallel={"cp": 2}, log={"every": 1})
    records = pool.run(run_job, world=2, raw=raw)[0]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(CheckpointStore(tmp_path / "b").path(6))
    raw = raw_config(tmp_path / "b", shards, pattern=held, parallel=grid, log={"every": 1})
    resumed = pool.run(run_job, world=grid.get("dp", 1) * grid.get("cp", 1), raw=raw)[0]
    assert losses(resumed) == pytest.approx(losses(records), rel=1e-4)
    for before, after in zip(records[3:], resumed[3:], strict=True):
        assert after["layer_density"] == pytest.approx(before["layer_density"])
        for key in ("uncovered", "uncovered_run", "uncovered_run_far"):
            assert after[key] == pytest.approx(before[key], abs=1e-6), key
    densities = [record["layer_density"] for record in records]
    assert densities[3] != densities[0]
    assert records[-1]["uncovered_run"] < records[0]["uncovered_run"]


def test_resuming_without_the_frozen_indices_is_refused(
    run: Path, tmp_path: Path, pool: ProcessPool, shards: Path
) -> None:
    raw = raw_config(
        interrupted(run, tmp_path / "again"),
        shards,
        pattern={"refresh": {"frozen_at": 2}},
        parallel={"cp": 2},
    )
    with pytest.raises(UserError, match="step 4 needs the indices of step 2, which this run does not hold"):
        pool.run(run_job, world=2, raw=raw)


def test_a_table_of_patterns_and_dense_first_layers(tmp_path: Path, pool: ProcessPool, shards: Path) -> None:
    table = tmp_path / "table.json"
    table.write_text(
        json.dumps(
            [{str(head): ["stream_llm", 4, 8 + 16 * layer, 1] for head in range(4)} for layer in (0, 1)]
        )
    )
    raw = raw_config(
        tmp_path / "run",
        shards,
        pattern={"table": str(table), "dense_layers": 1},
        log={"every": 1},
        train={"steps": 2},
    )
    dense, windowed = pool.run(run_job, world=1, raw=raw)[0][0]["layer_density"]
    assert dense == 1.0
    blocks = raw["train"]["seq_len"] // 16
    diagonals = sum(blocks - d for d in range(3))
    columns = 4 / 16 * (blocks - 3)  # in the first three blocks of queries they lie in tiles
    assert windowed == pytest.approx((diagonals + columns) / (blocks * (blocks + 1) / 2))
    table.write_text(json.dumps([{"0": ["stream_llm", 4, 8, 1]}] * 2))
    with pytest.raises(UserError, match="layer 1 has 1 heads there and 4 in the model"):
        pool.run(run_job, world=1, raw=raw | {"output": str(tmp_path / "other")})
    table.write_text(json.dumps([{"0": ["stream_llm", 4, 8, 1]}] * 3))
    with pytest.raises(UserError, match="has 3 layers and the model 2"):
        pool.run(run_job, world=1, raw=raw | {"output": str(tmp_path / "third")})
