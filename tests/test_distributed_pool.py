"""The process pool itself: results, meshes, failures on one rank, deaths, time-outs, recovery."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed import ProcessPool, Worker, WorkerError
from processes import started, wait_for


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
    pool.run(total, world=2, value=1.0)  # so that both have started
    with pytest.raises(WorkerError, match=r"ranks \[0, 1\] gave no result in 1 s") as caught:
        pool.run(sleep, world=2, timeout=1.0, seconds=600)
    stacks = str(caught.value).partition("rank 1 was in")
    assert all("test_distributed_pool.py" in part and "in sleep" in part for part in stacks[::2])


def test_seeds_are_reset_between_jobs(pool: ProcessPool) -> None:
    assert len(set(pool.run(draw, world=2) + pool.run(draw, world=2))) == 1


def test_warnings_are_errors_in_the_processes_too(pool: ProcessPool) -> None:
    with pytest.raises(UserWarning, match="a warning"):
        pool.run(warn, world=1)


def states(pool: ProcessPool, world: int) -> set[str]:
    """The kernel's letters for what the processes of a world size do: T is stopped."""
    files = [Path(f"/proc/{process.pid}/stat") for process in pool._crews[world].processes]
    return {file.read_text().rpartition(")")[2].split()[0] for file in files}


def test_idle_processes_take_no_time() -> None:
    own = ProcessPool()
    try:
        for _ in range(2):
            assert own.run(total, world=2, value=1.0)
            deadline = time.monotonic() + 60
            while states(own, 2) != {"T"}:
                assert time.monotonic() < deadline, f"idle processes are in states {states(own, 2)}"
                time.sleep(0.01)
    finally:
        own.close()


PARENT = """
import sys, time
sys.path[:0] = {path!r}
from distributed import ProcessPool
from test_distributed_pool import total
if __name__ == "__main__":
    pool = ProcessPool()
    pool.run(total, world=2, value=1.0)
    print(*(process.pid for process in pool._crews[2].processes), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_stopped_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "parent.py"
    program.write_text(PARENT.format(path=sys.path), encoding="utf-8")
    with started([sys.executable, program]) as parent:
        wait_for(lambda: parent.so_far().stdout.endswith("\n"), alive=[parent])
        pids = parent.so_far().stdout.split()
        assert len(pids) == 2
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"processes {pids} outlive their parent"
        time.sleep(0.1)
