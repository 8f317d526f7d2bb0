"""Measured tiles are part of a run: ranks that differ are refused, and a resumed run is told of other ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import raw_config, run_job, tiny_config

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import device_name, measured_tiles, tiles_path, triton_version
from mtraining.train.loop import train
from mtraining.train.metrics import read_metrics
from mtraining.train.store import CheckpointStore, read_manifest

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unread() -> Iterator[None]:
    measured_tiles.cache_clear()
    yield
    measured_tiles.cache_clear()


def write_tiles(folder: Path, stages: int) -> Path:
    """A file for the tiny run's heads of 16, in fp32 and bf16."""
    tiles = {"block_m": 16, "block_n": 16, "warps": 4, "stages": stages, "tma": False}
    call = {"kernel": "tiles_dq", "head_dim": 16, "block_size": 16, "tiles": tiles}
    document = {
        "gpu": device_name(CPU), "triton": triton_version(),
        "entries": [{**call, "dtype": "fp32"}, {**call, "dtype": "bf16"}],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / tiles_path(CPU).name
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def job_with_own_cache(worker: Worker, raw: dict[str, Any], folder: str) -> str:
    before = os.environ["MTRAINING_CACHE"]
    os.environ["MTRAINING_CACHE"] = os.path.join(folder, str(worker.rank))
    measured_tiles.cache_clear()
    try:
        run_job(worker, raw)
    except UserError as error:
        return str(error)
    finally:
        os.environ["MTRAINING_CACHE"] = before
        measured_tiles.cache_clear()
    return "it went on"


def test_ranks_with_different_tiles_are_refused(tmp_path: Path, pool: ProcessPool, shards: Path) -> None:
    raw = raw_config(
        tmp_path / "run",
        shards,
        parallel={"cp": 2},
        train={"steps": 1, "warmup_steps": 0, "batch_size": 1, "micro_batch_size": 1},
    )

    def told() -> list[str]:
        return pool.run(job_with_own_cache, world=2, raw=raw, folder=str(tmp_path))

    path = write_tiles(tmp_path / "1", stages=2)
    for rank, sentence in enumerate(told()):  # rank 0 has none
        assert sentence.startswith(f"ranks 0 and 1, both on {device_name(CPU)}, would compute attention with")
        assert f"copy {path.name} of one machine into the others' {tmp_path / str(rank)}, or set" in sentence
        assert "MTRAINING_CACHE" in sentence
    write_tiles(tmp_path / "0", stages=2)
    path.write_text("{", encoding="utf-8")
    first, second = told()
    assert first == second and f"the tiles file {path} cannot be used" in first
    write_tiles(tmp_path / "1", stages=2)
    assert told() == ["it went on"] * 2
    assert len(read_metrics(tmp_path / "run")) == 1


def test_a_resumed_run_is_told_of_other_tiles(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MTRAINING_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"

    def told(steps: int) -> str:
        measured_tiles.cache_clear()
        train(
            tiny_config(
                run, shards, train={"steps": steps, "warmup_steps": 0, "batch_size": 1, "micro_batch_size": 1}
            )
        )
        return " ".join(capsys.readouterr().out.split())

    def tiles(step: int) -> str:
        return read_manifest(CheckpointStore(run).path(step)).tiles

    other = "the checkpoint was computed with other tiles of attention"
    assert other not in told(1) and tiles(1) == "tables"
    assert "resuming from" in (again := told(1)) and other not in again
    path = write_tiles(tmp_path / "cache", stages=2)
    warned = told(2)
    assert f"{other} (tables) than are in use here ({tiles(2)})" in warned and len(tiles(2)) == 12
    assert "for the same bits move" in warned and path.name in warned.replace(" ", "")
    assert "resuming from" in (again := told(2)) and other not in again
    path.unlink()
    warned = told(2)
    assert f"{other} ({tiles(2)}) than are in use here (tables)" in warned
    assert "for the same bits bring back" in warned
