"""Runs with `train.recompute: auto`: layers that keep different things learn the same, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import raw_config

from distributed import ProcessPool, Worker
from memory_limits import limited
from mtraining.train import loop
from mtraining.train import memory_report as in_training
from mtraining.train.config import parse_config
from mtraining.train.export import export_run
from mtraining.train.metrics import read_metrics

FOUR = {"config": {**raw_config(Path(), Path())["model"]["config"], "num_hidden_layers": 4}}
"""Layers enough for several kinds."""
TRAIN = {"steps": 2, "micro_batch_size": 1, "batch_size": 4}


def run(
    output: Path, shards: Path, recompute: str, mode: str = "documents", **sections: Any
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    train = {**TRAIN, "recompute": recompute}
    raw = raw_config(output, shards, **{"model": FOUR, **sections, "train": train})
    raw["data"]["mode"] = mode
    return [(one["loss"], one["grad_norm"]) for one in read_metrics(loop.train(parse_config(raw)).run)]


def both(worker: Worker, folder: Path, **options: Any) -> Any:
    """Job: what was chosen where memory is scarce, and a run with it beside one that keeps everything."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = limited(patch, in_training, 0.4)
        found = run(folder / "auto", recompute="auto", **options)
    return chosen, found, run(folder / "none", recompute="none", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "packed", "parallel": {"cp": 2}},
        pytest.param({"model": {**FOUR, "lora": {"r": 4}}, "parallel": {"dp": 2}}, marks=pytest.mark.slow),
    ],
    ids=["packed ring", "adapter"],
)
def test_layers_that_keep_different_things_learn_the_same(
    pool: ProcessPool, tmp_path: Path, shards: Path, options: dict[str, Any]
) -> None:
    if "model" in options:
        pytest.importorskip("peft")
    for chosen, found, expected in pool.run(both, 2, folder=tmp_path, shards=shards, **options):
        assert len(chosen) == 1 and len(set(chosen[0])) > 1
        assert len(found) == 2 and found == expected


def test_on_a_cpu_the_log_tells_that_all_is_kept(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "run", shards, "auto")
    told = " ".join(capsys.readouterr().out.split())
    assert "train.recompute=auto: all layers keep everything" in told
    assert told.index("auto: all layers") < told.index("memory a GPU, predicted")
    # An export computes nothing, so it asks nobody how much memory there is.
    with pytest.MonkeyPatch.context() as patch:
        chosen = limited(patch, in_training, 0.0)
        export_run(tmp_path / "run", tmp_path / "model")
    assert chosen == [] and (tmp_path / "model" / "config.json").exists()
