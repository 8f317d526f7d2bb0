"""Real launches: our own --nproc, a killed rank, and torchrun."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import raw_config

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
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text(encoding="utf-8").split()
    found = []
    for child in children:
        command = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"spawn_main" in command and b"resource_tracker" not in command:
            found.append(int(child))
    return sorted(found)


def test_a_killed_rank_ends_the_run_in_seconds(tmp_path: Path, shards: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        shards,
        parallel={"cp": 2},
        train={"steps": 100_000},
        checkpoint={"every": 2, "async": False},
    )
    store = CheckpointStore(tmp_path / "run")
    with subprocess.Popen(
        [*COMMAND, str(recipe), "--nproc", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + 200
            while store.latest() is None or len(read_metrics(tmp_path / "run")) < 4:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                assert time.monotonic() < deadline
                time.sleep(0.05)
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
    assert str(store.latest()) in told[0]
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


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
