"""Real launches: our own --nproc, a killed rank, and torchrun."""

import json
import os
import re
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import raw_config, run_job

from distributed import ProcessPool
from mtraining.errors import SAVED, RunStopped
from mtraining.train.about import ABOUT
from mtraining.train.backstop import ranks_of
from mtraining.train.launch import run_processes
from mtraining.train.metrics import read_metrics
from mtraining.train.peers import OsProcess
from mtraining.train.store import CheckpointStore
from processes import Done, Started, run_command, started, wait_for

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


def _fail_together(folder: Path) -> None:
    """Rank 1 fails by itself, a moment after rank 0, which only met a connection that was closed."""
    met = folder / "met"
    if os.environ["RANK"] == "0":
        met.touch()
        raise RuntimeError("[/a/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    wait_for(met.exists, 60)
    raise ValueError("the true cause")


def test_the_rank_with_the_cause_is_blamed(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="rank 1 failed .the true cause"):
        run_processes(_fail_together, (tmp_path,), 2, lambda: "go on")


def write_recipe(folder: Path, shards: Path, **sections: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_config(folder / "run", shards, **sections)), encoding="utf-8")
    return path


# Far longer than the few seconds that it takes, far shorter than any limit of a collective or of silence.
ENDED_SECONDS = 90
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


def wait_for_steps(run: Path, processes: list[Started]) -> None:
    """Until there is a checkpoint and a step beyond it."""
    wait_for(
        lambda: CheckpointStore(run).latest() is not None and len(read_metrics(run)) >= 4, alive=processes
    )


def sentences(done: Done) -> list[str]:
    return re.findall(r"^error: .*", done.stderr, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_rank_ends_the_run_in_seconds_and_it_resumes(
    tmp_path: Path, shards: Path, pool: ProcessPool, device: str
) -> None:
    recipe, run = long_recipe(tmp_path, shards, device, cp=2), tmp_path / "run"
    store = CheckpointStore(run)
    with started([*COMMAND, recipe, "--nproc", "2"]) as process:
        wait_for_steps(run, [process])
        ranks = ranks_of(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[1].pid, signal.SIGKILL)
        done = process.wait(ENDED_SECONDS)
    assert done.returncode == 1
    told = sentences(done)
    assert len(told) == 1
    assert told[0].startswith(
        "error: rank 1 was killed by SIGKILL, so the other ranks were ended; the last good checkpoint"
    )
    latest = store.latest()
    assert latest is not None and str(latest) in told[0]
    assert "Traceback" not in done.stderr
    assert all(rank.gone() for rank in ranks)

    saved = int(latest.name.removeprefix("step_"))
    before = {record["step"]: record["loss"] for record in read_metrics(run)}
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    raw["train"]["steps"] = saved + 2
    if device == "cpu":
        pool.run(run_job, world=2, raw=raw)
    else:
        recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")
        run_command([*COMMAND, recipe, "--nproc", "2"])
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, saved + 3))
    assert [record["loss"] for record in records[:saved]] == [before[step] for step in range(1, saved + 1)]
    assert store.latest() == store.path(saved + 2)


@pytest.mark.slow
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
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(
                    [*COMMAND, recipe],
                    env=os.environ
                    | {k: str(v) for k, v in (place | {"RANK": rank, "LOCAL_RANK": rank}).items()},
                )
            )
            for rank in range(world)
        ]
        wait_for_steps(tmp_path / "run", processes)
        processes[-1].signal(signal.SIGKILL)
        done = [process.wait(ENDED_SECONDS) for process in processes]
    assert [each.returncode for each in done] == [1] * (world - 1) + [-signal.SIGKILL]
    told = sentences(done[0])
    assert len(told) == 1
    assert told[0].startswith(f"error: rank {world - 1} died: its process is gone, so rank 0 ends too")
    assert str(CheckpointStore(tmp_path / "run").latest()) in told[0]


@pytest.mark.slow
def test_a_rank_that_is_stopped_for_20_seconds_goes_on(tmp_path: Path, shards: Path) -> None:
    """With the least silence that the configuration takes set above those 20 s."""
    recipe, run = long_recipe(tmp_path, shards, "cpu", cp=2), tmp_path / "run"
    with started([*COMMAND, recipe, "--nproc", "2", "--set", "distributed.silence_seconds=60"]) as process:
        wait_for_steps(run, [process])
        rank = ranks_of(process.pid)[1]
        os.kill(rank.pid, signal.SIGSTOP)
        time.sleep(20)
        before = len(read_metrics(run))
        os.kill(rank.pid, signal.SIGCONT)
        wait_for(lambda: len(read_metrics(run)) > before + 2, alive=[process])
        process.signal(signal.SIGTERM)
        done = process.wait()
    assert done.returncode == SAVED
    assert sentences(done) == []


@pytest.mark.slow
@pytest.mark.sweep
def test_busy_loops_beside_a_run_do_not_end_it(tmp_path: Path, shards: Path) -> None:
    recipe = write_recipe(tmp_path, shards, parallel={"cp": 2}, distributed={"silence_seconds": 10})
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(started([sys.executable, "-c", "while True: pass"]))
        run_command([*COMMAND, recipe, "--nproc", "2", "--set", "train.steps=3"], limit=550)
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path, shards: Path) -> None:
    recipe, run = long_recipe(tmp_path, shards, "cpu", cp=2), tmp_path / "run"
    with started([*COMMAND, recipe, "--nproc", "2"]) as process:
        wait_for_steps(run, [process])
        ranks = ranks_of(process.pid)
        process.signal(signal.SIGKILL)
        try:
            wait_for(lambda: all(rank.gone() for rank in ranks), ENDED_SECONDS)
        finally:
            for rank in ranks:
                if not rank.gone():
                    os.kill(rank.pid, signal.SIGKILL)


LOCKUPS = Path(__file__).parent / "lockups.py"


@pytest.mark.parametrize(
    ("victim", "harm", "sentence"),
    [
        (1, "kill", "error: rank 1 was killed by SIGKILL"),
        pytest.param(0, "kill", "error: rank 0 was killed by SIGKILL", marks=pytest.mark.sweep),
        pytest.param(1, "raise", "error: rank 1 failed (on purpose)", marks=pytest.mark.sweep),
        pytest.param(1, "raise base", "error: rank 1 failed (on purpose)", marks=pytest.mark.sweep),
    ],
)
@pytest.mark.slow
def test_a_rank_lost_during_a_background_save_ends_the_run(
    tmp_path: Path, shards: Path, victim: int, harm: str, sentence: str
) -> None:
    """The victim's save never ends: the other rank's save waits for it in a collective, as would a normal exit."""
    recipe = write_recipe(
        tmp_path,
        shards,
        parallel={"cp": 2},
        train={"steps": 100_000, "kernel": "reference"},
        pattern={"refresh": {"every_n": 3}},
        checkpoint={"every": 4, "async": True},
        distributed={"timeout_seconds": 600},
    )
    saving = tmp_path / "saving"
    with started([sys.executable, LOCKUPS, recipe, str(victim), harm, saving]) as process:
        wait_for(saving.exists, alive=[process])
        if harm == "kill":
            os.kill(ranks_of(process.pid)[victim].pid, signal.SIGKILL)
        done = process.wait(ENDED_SECONDS)
    assert done.returncode == 1
    assert [line[: len(sentence)] for line in sentences(done)] == [sentence]


def data_workers(command: Started) -> list[OsProcess]:
    """The processes that read data: each leads a process group of its own."""
    return [each for each in command.descendants() if not each.gone() and os.getpgid(each.pid) == each.pid]


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.sweep])])
def test_a_killed_data_worker_is_told_in_one_sentence(tmp_path: Path, shards: Path, nproc: int) -> None:
    recipe = long_recipe(tmp_path, shards, "cpu", cp=nproc)
    with started([*COMMAND, recipe, "--nproc", str(nproc), "--set", "data.workers=1"]) as process:
        wait_for_steps(tmp_path / "run", [process])
        worker = data_workers(process)[0]
        os.kill(worker.pid, signal.SIGKILL)
        done = process.wait(ENDED_SECONDS)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"error: a process that reads data for rank \d \(process {worker.pid}\) was killed by SIGKILL, as the system "
        r"does when memory runs out \(fewer data.workers need less\); the last good checkpoint is .*\n",
        done.stderr,
    )


@pytest.mark.slow
def test_bad_input_found_by_the_ranks_is_told_once(tmp_path: Path, shards: Path) -> None:
    recipe = write_recipe(tmp_path, shards, parallel={"cp": 2})
    done = run_command(
        [*COMMAND, recipe, "--nproc", "2", "--set", "model.config.attention_dropout=0.1"], code=2
    )
    assert len(done.stderr.strip().splitlines()) == 1
    assert "dropout" in done.stderr


def test_torchrun(tmp_path: Path, shards: Path) -> None:
    recipe = write_recipe(tmp_path, shards, parallel={"dp": 2}, train={"steps": 2})
    run_command([*TORCHRUN, "train", recipe])
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2]
    assert CheckpointStore(tmp_path / "run").latest() == CheckpointStore(tmp_path / "run").path(2)
    # The start of torchrun itself is in it.
    assert json.loads((tmp_path / "run" / ABOUT).read_text())["start"]["seconds"]["imports"] > 0


@pytest.mark.slow
def test_torchrun_tells_bad_input_once(tmp_path: Path, shards: Path) -> None:
    recipe = write_recipe(tmp_path, shards, parallel={"cp": 4})
    done = run_command([*TORCHRUN, "train", recipe], code=None)
    assert done.returncode != 0
    told = sentences(done)
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
