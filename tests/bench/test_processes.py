"""Processes that share GPUs stand on pretended nodes, where no GPU is used twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtraining.bench.processes import gpus_in_use, share_gpus, take_device
from mtraining.train.peers import children
from processes import started, wait_for

CHANGED = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "NCCL_HOSTID", "NCCL_NET")


def places(monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int) -> list[tuple[str | None, ...]]:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    found = []
    for rank in range(processes):
        with monkeypatch.context() as patch:
            for name in (
                *CHANGED,
                "NCCL_SOCKET_IFNAME",
                "NCCL_IB_DISABLE",
                "NCCL_MNNVL_ENABLE",
                "NCCL_NVLS_ENABLE",
            ):
                patch.setenv(name, "")
                patch.delenv(name)
            patch.setenv("LOCAL_RANK", str(rank))
            patch.setenv("LOCAL_WORLD_SIZE", str(processes))
            share_gpus()
            share_gpus()  # changes nothing more
            found.append(tuple(os.environ.get(name) for name in CHANGED))
    return found


def test_one_gpu_is_a_node_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places(monkeypatch, 1, 4) == [("0", "1", f"0-{node}", "Socket") for node in range(4)]


def test_neighbouring_ranks_share_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places(monkeypatch, 2, 3) == [
        ("0", "2", "0-0", "Socket"),
        ("1", "2", "0-0", "Socket"),
        ("0", "1", "0-1", "Socket"),
    ]
    assert gpus_in_use(3) == 2


@pytest.mark.parametrize("gpus", [0, 2, 4])
def test_nothing_changes_where_nothing_is_shared(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    assert places(monkeypatch, gpus, 2) == [("0", "2", None, None), ("1", "2", None, None)]


def test_a_cpu_asks_for_no_launcher() -> None:
    assert take_device(on_gpu=False) == torch.device("cpu")


@pytest.mark.parametrize("launched, code", [({"TORCHELASTIC_RUN_ID": "1"}, 3), ({}, -signal.SIGABRT)])
def test_a_launched_process_leaves_before_anything_can_abort_it(launched: dict[str, str], code: int) -> None:
    ends = (
        "import atexit, os; atexit.register(os.abort); from mtraining.bench.processes import leave; "
        "print('told'); leave(3)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    done = subprocess.run(
        [sys.executable, "-c", ends], env=environment | launched, stdout=subprocess.PIPE, check=False
    )
    assert done.returncode == code
    if launched:
        assert done.stdout == b"told\n"


RANK = """
import os, time
from pathlib import Path
from mtraining.bench.processes import take_device
take_device(on_gpu=False)
Path(f"ready{os.environ['RANK']}").touch()
time.sleep(600)
"""


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_benchmark(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    benchmark = "from mtraining.bench.processes import start; start('rank', [], 2, gpu=False)"
    with started([sys.executable, "-c", benchmark], cwd=tmp_path) as process:
        wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 2, 120)
        (launcher,) = children(process.pid)
        ranks = children(launcher.pid)
        process.signal(signal.SIGKILL)
        try:
            assert len(ranks) == 2
            wait_for(lambda: all(each.gone() for each in (launcher, *ranks)), 60)
        finally:
            for each in (launcher, *ranks):
                if not each.gone():
                    os.kill(each.pid, signal.SIGKILL)
