"""Real launches: our own --nproc, a killed rank, and torchrun."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from tiny_run import raw_config, run_job
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from distributed import ProcessPool
from mtraining.train import launch, watch
from mtraining.train.metrics import read_metrics
from mtraining.train.store import CheckpointStore

COMMAND = [sys.executable, "-m", "mtraining.cli", "train"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "mtraining.cli",
]


def write_recipe(folder: Path, shards: Path, **sections: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_config(folder / "run", shards, **sections)), encoding="utf-8")
    return path


def workers(launcher: int) -> list[int]:
    """The rank processes of a launcher, in the order they were started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            status = (process / "status").read_text(encoding="utf-8")
            command = (process / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        child = re.search(rf"^PPid:\s*{launcher}$", status, flags=re.MULTILINE) is not None
        if child and b"spawn_main" in command and b"resource_tracker" not in command:
            found.append(int(process.name))
    return sorted(found)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def long_recipe(folder: Path, shards: Path, device: str, cp: int) -> Path:
    """A run that does not end by itself, with a checkpoint every other step."""
    if device == "cuda" and torch.cuda.device_count() < cp:
        pytest.skip(f"needs {cp} GPUs")
    return write_recipe(
        folder,
        shards,
        parallel={"cp": cp},
        train={"steps": 100_000, "kernel": "reference"},
        checkpoint={"every": 2, "async": False},
        distributed={"device": device, "timeout_seconds": 600},
    )


def wait_for_steps(run: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Until there is a checkpoint and a step beyond it."""
    deadline = time.monotonic() + 200
    while CheckpointStore(run).latest() is None or len(read_metrics(run)) < 4:
        for process in processes:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_rank_ends_the_run_in_seconds_and_it_resumes(
    tmp_path: Path, shards: Path, pool: ProcessPool, device: str
) -> None:
    recipe, run = long_recipe(tmp_path, shards, device, cp=2), tmp_path / "run"
    store = CheckpointStore(run)
    with subprocess.Popen(
        [*COMMAND, str(recipe), "--nproc", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_for_steps(run, [process])
            ranks = workers(process.pid)
            assert len(ranks) == 2
            os.kill(ranks[1], signal.SIGKILL)
            killed = time.monotonic()
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()  # does nothing to a launcher that has ended; its ranks end with it
    assert time.monotonic() - killed < 30
    assert process.returncode == 1
    told = re.findall(r"^error: .*", errors, flags=re.MULTILINE)
    assert len(told) == 1
    assert told[0].startswith(
        "error: rank 1 was killed by SIGKILL, so the other ranks were ended; the last good checkpoint"
    )
    latest = store.latest()
    assert latest is not None and str(latest) in told[0]
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)

    saved = int(latest.name.removeprefix("step_"))
    before = {record["step"]: record["loss"] for record in read_metrics(run)}
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    raw["train"]["steps"] = saved + 2
    if device == "cpu":
        pool.run(run_job, world=2, raw=raw)
    else:
        recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")
        subprocess.run([*COMMAND, str(recipe), "--nproc", "2"], capture_output=True, timeout=200, check=True)
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, saved + 3))
    assert [record["loss"] for record in records[:saved]] == [before[step] for step in range(1, saved + 1)]
    assert store.latest() == store.path(saved + 2)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_common_launcher_the_ranks_notice_who_died(
    tmp_path: Path, shards: Path, device: str
) -> None:
    """As on several machines: nobody but the ranks themselves can end the others and name the dead one."""
    world = 2 if device == "cpu" else 4
    recipe = long_recipe(tmp_path, shards, device, cp=world)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [*COMMAND, str(recipe)],
            env=os.environ | {k: str(v) for k, v in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        wait_for_steps(tmp_path / "run", processes)
        processes[-1].kill()
        killed = time.monotonic()
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert time.monotonic() - killed < 30
    assert [process.returncode for process in processes] == [1] * (world - 1) + [-signal.SIGKILL]
    told = re.findall(r"^error: .*", errors[0], flags=re.MULTILINE)
    assert len(told) == 1
    assert told[0].startswith(f"error: rank {world - 1} stopped answering")
    assert str(CheckpointStore(tmp_path / "run").latest()) in told[0]


@pytest.mark.parametrize("error", [ValueError("out of luck"), dist.DistBackendError("NCCL error")])
def test_a_rank_that_fails_names_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    """Two ranks as two watches on one store: the one that fails is named, also when it looked like a victim first; and
    the launcher names it too, though it is the other rank that it sees end."""
    store = dist.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(watch, "launcher_store", lambda: dist.TCPStore("localhost", store.port))
    for name in ("BEAT_SECONDS", "SUSPECT_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(watch, name, getattr(watch, name) / 20)
    monkeypatch.setattr(watch, "_numbers", itertools.repeat(0))
    reason = tmp_path / "reason.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(reason))
    ended: list[int] = []

    def fail() -> None:
        time.sleep(0.2)
        raise error

    monkeypatch.setattr(watch, "exit_now", ended.append)
    watch._Watch(tmp_path, 0, 2, 600)
    with pytest.raises(type(error)), watch.watched(tmp_path, 1, 2, 600):
        fail()
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended[:1] == [1]
    told = capfd.readouterr().err.splitlines()[0]
    assert told.startswith(
        f"error: rank 1 failed ({type(error).__name__}: {error}), so rank 0 ends too; there is no"
    )
    seen = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(reason))
    assert str(launch._cause(0, seen, watch.way_on(tmp_path))).startswith(
        f"rank 1 failed ({type(error).__name__}: {error}), so the other ranks were ended; there is no"
    )


def test_a_stall_says_where_each_rank_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Four ranks as four watches on one store; three wait for the one that hangs elsewhere. Told once."""
    store = dist.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setattr(watch, "launcher_store", lambda: dist.TCPStore("localhost", store.port))
    monkeypatch.setattr(watch, "_numbers", itertools.repeat(0))
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(watch, "PACKAGE", Path(__file__).parent)
    watches: list[watch._Watch] = []
    end = threading.Event()

    def waits() -> None:
        end.wait()

    def reads_data() -> None:
        end.wait()

    def rank(number: int) -> None:
        watches.append(watch._Watch(tmp_path, number, 4, 0.4))
        (reads_data if number == 2 else waits)()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    end.set()
    for thread in threads:
        thread.join()
    for each in watches:
        each._leaving.set()
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1
    hung, waiting = (rf"test_launch\.py:\d+ \({name}\)" for name in ("reads_data", "waits"))
    pattern = rf"warning: rank 0 has not moved for 0 s; rank 2 in {hung}; ranks 0-1, 3 in {waiting}\. A collective .*"
    assert re.fullmatch(pattern, told[0])


def test_bad_input_found_by_the_ranks_is_told_once(tmp_path: Path, shards: Path) -> None:
    recipe = write_recipe(tmp_path, shards, parallel={"cp": 2})
    done = subprocess.run(
        [*COMMAND, str(recipe), "--nproc", "2", "--set", "model.config.attention_dropout=0.1"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "dropout" in done.stderr


def test_torchrun(tmp_path: Path, shards: Path) -> None:
    recipe = write_recipe(tmp_path, shards, parallel={"dp": 2}, train={"steps": 2})
    subprocess.run([*TORCHRUN, "train", str(recipe)], capture_output=True, text=True, timeout=200, check=True)
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]
    assert CheckpointStore(tmp_path / "run").latest() == CheckpointStore(tmp_path / "run").path(2)


def test_torchrun_tells_bad_input_once(tmp_path: Path, shards: Path) -> None:
    recipe = write_recipe(tmp_path, shards, parallel={"cp": 4})
    done = subprocess.run(
        [*TORCHRUN, "train", str(recipe)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode != 0
    told = re.findall(r"^error: .*", done.stderr, flags=re.MULTILINE)
    assert len(told) == 1
    assert "needs 4 processes but 2 processes were started" in told[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "train.stepz=1"], "did you mean train.steps?"),
        (["--set", "train.seq_len=250"], "the nearest length that works is 256"),
        (["--set", "parallel.cp=2"], "pass --nproc 2"),
        (["--set", "parallel.cp=2", "--nproc", "4"], "needs 2 processes but 4"),
    ],
)
def test_the_command_line_tells_without_a_traceback(
    tmp_path: Path,
    shards: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mtraining.cli import main

    recipe = write_recipe(tmp_path, shards)
    monkeypatch.setattr(sys, "argv", ["mtraining", "train", str(recipe), *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert sentence in errors
    assert len(errors.strip().splitlines()) == 1
