"""How long collectives wait: as the run says, in every group that it makes, and in none that it found."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_run import raw_config

from distributed import ProcessPool, Worker
from mtraining.train import loop
from mtraining.train.config import parse_config
from mtraining.train.mesh import joined_processes, process_groups


def waits(groups: Any) -> set[timedelta]:
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def waits_of_a_run(worker: Worker, raw: dict[str, Any]) -> tuple[set[timedelta], set[timedelta]]:
    """Of the groups that a run makes, and of those that were there before and after it."""
    before = process_groups()
    found = waits(before)
    config = parse_config(raw)
    with joined_processes(config) as process:
        loop.parallel_model(config, process)
        assert waits(before) == found
        return waits(process_groups() - before), found


@pytest.mark.parametrize(
    ("seconds", "grid"),
    # Processes of tests keep the groups of earlier ones, so each number is its own.
    [(121, {"dp": 2, "cp": 2}), (122, {"cp": 4, "cp_outer": 2}), (123, {"cp": 2})],
    ids=str,
)
def test_every_group_of_a_run_waits_as_long_as_it_says(
    pool: ProcessPool, tmp_path: Path, shards: Path, seconds: int, grid: dict[str, int]
) -> None:
    raw = raw_config(
        tmp_path, shards, parallel=grid, distributed={"device": "cpu", "timeout_seconds": seconds}
    )
    world = grid.get("dp", 1) * grid["cp"]
    for own, before in pool.run(waits_of_a_run, world=world, raw=raw):
        assert timedelta(seconds=seconds) not in before
        assert own == {timedelta(seconds=seconds)}


def test_a_run_of_its_own_gives_its_time_to_the_default_group_too(tmp_path: Path, shards: Path) -> None:
    config = parse_config(raw_config(tmp_path, shards, distributed={"device": "cpu", "timeout_seconds": 123}))
    with joined_processes(config) as process:
        loop.parallel_model(config, process)
        assert waits(process_groups()) == {timedelta(seconds=123)}
    assert not dist.is_initialized()
