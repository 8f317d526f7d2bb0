"""The process pool itself: results, meshes, failures on one rank, deaths, time-outs, recovery."""

from __future__ import annotations

import os
import signal
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed import ProcessPool, Worker, WorkerError


def total(worker: Worker, value: float) -> torch.Tensor:
    x = torch.full((2,), value * (worker.rank + 1), dtype=torch.float64)
    dist.all_reduce(x)
    return x


def coordinates(worker: Worker, shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Any]:
    mesh = worker.mesh(shape, names)
    assert worker.mesh(shape, names) is mesh
    sums = {}
    for name in names:
        x = torch.tensor([worker.rank])
        dist.all_reduce(x, group=mesh[name].get_group())
        sums[name] = int(x)
    return sums


def fail_on(worker: Worker, rank: int) -> None:
    if worker.rank == rank:
        raise KeyError("broken on purpose")
    dist.barrier()


def die_on(worker: Worker, rank: int) -> None:
    if worker.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep(worker: Worker, seconds: float) -> None:
    time.sleep(seconds)


def draw(worker: Worker) -> float:
    return float(torch.rand(()))


def warn(worker: Worker) -> None:
    warnings.warn("a warning", UserWarning, stacklevel=1)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_rank_takes_part(pool: ProcessPool, world: int) -> None:
    expected = torch.full((2,), 0.5 * world * (world + 1) / 2, dtype=torch.float64)
    results = pool.run(total, world=world, value=0.5)
    assert len(results) == world
    assert all(torch.equal(result, expected) for result in results)


def test_meshes_are_row_major(pool: ProcessPool) -> None:
    results = pool.run(coordinates, world=8, shape=(2, 4), names=("cp_outer", "cp_inner"))
    assert results == [{"cp_outer": 2 * (r % 4) + 4, "cp_inner": 6 if r < 4 else 22} for r in range(8)]
    results = pool.run(coordinates, world=4, shape=(2, 2), names=("dp", "cp"))
    assert results == [{"dp": 2 * (r % 2) + 2, "cp": 1 if r < 2 else 5} for r in range(4)]


def test_failure_on_one_rank_is_raised_and_survived(pool: ProcessPool) -> None:
    start = time.monotonic()
    with pytest.raises(KeyError, match="broken on purpose") as caught:
        pool.run(fail_on, world=2, rank=1)
    assert isinstance(caught.value.__cause__, WorkerError)
    assert "rank 1" in str(caught.value.__cause__)
    assert "fail_on" in str(caught.value.__cause__)
    assert time.monotonic() - start < 30
    assert len(pool.run(total, world=2, value=1.0)) == 2


def test_death_of_one_rank_is_told(pool: ProcessPool) -> None:
    with pytest.raises((WorkerError, RuntimeError)) as caught:
        pool.run(die_on, world=2, rank=0)
    told = caught.value if isinstance(caught.value, WorkerError) else caught.value.__cause__
    assert "rank 0 died (exit code -9)" in str(told)
    assert len(pool.run(total, world=2, value=1.0)) == 2


def test_a_stuck_job_is_ended(pool: ProcessPool) -> None:
    with pytest.raises(WorkerError, match=r"ranks \[0, 1\] gave no result in 1 s"):
        pool.run(sleep, world=2, timeout=1.0, seconds=600)


def test_seeds_are_reset_between_jobs(pool: ProcessPool) -> None:
    assert len(set(pool.run(draw, world=2) + pool.run(draw, world=2))) == 1


def test_warnings_are_errors_in_the_processes_too(pool: ProcessPool) -> None:
    with pytest.raises(UserWarning, match="a warning"):
        pool.run(warn, world=1)
