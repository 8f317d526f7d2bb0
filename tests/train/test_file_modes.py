"""Whatever a run leaves behind has the mode that the umask says: others may read it, or none may."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import make_data, tiny_config

from mtraining.report import write_report
from mtraining.train.export import export_run
from mtraining.train.loop import train


@pytest.fixture(params=[0o022, 0o027], ids=["022", "027"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_every_file_of_a_run(umask: int, tmp_path: Path) -> None:
    data = make_data(tmp_path / "text")
    train(
        tiny_config(
            tmp_path / "run",
            data,
            train={"steps": 2},
            checkpoint={"every": 1, "export": True},
            log={"trackers": ["tensorboard"]},
        )
    )
    export_run(tmp_path / "run", tmp_path / "exported")
    write_report([tmp_path / "run"], tmp_path / "report")
    modes = {path: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.suffix for path in modes} >= {
        ".safetensors",
        ".distcp",
        ".json",
        ".jsonl",
        ".yaml",
        ".bin",
        ".npy",
    }
    assert {path: oct(mode) for path, mode in modes.items() if mode != 0o666 & ~umask} == {}
