"""A run's predicted seconds beside the measured ones: told on known GPUs, and only there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import tiny_config

from mtraining.layout import build_layout
from mtraining.model import build_model
from mtraining.pattern import ToeplitzRandom
from mtraining.pattern.base import SequenceShard
from mtraining.predict.measured import rates_of
from mtraining.ring import AttentionStats, imbalance, tile_work
from mtraining.train import time_report
from mtraining.train.config import Config, load_config
from mtraining.train.loop import train
from mtraining.train.time_report import TimeLog, predict_seconds

RECIPE = Path(__file__).parents[2] / "recipes" / "qwen2.5-3b-512k.yaml"
# Two H200, 5 % of 512K, all layers: benchmarks/results/train-h200x2-2026-11-23.csv.
MEASURED = 17.6974


@pytest.fixture(scope="module")
def config() -> Config:
    changes = ["parallel={dp: 1, cp: 2, cp_outer: 1}", "train.recompute=keep_attention", "train.batch_size=1"]
    return load_config(RECIPE, changes)


@pytest.fixture(scope="module")
def model(config: Config) -> Any:
    return build_model(config.model, config.train.seq_len, device="meta")[0]


@pytest.fixture(scope="module")
def layers(config: Config) -> list[AttentionStats]:
    q = torch.empty(1, 1, 16, 1)
    pattern = ToeplitzRandom(density=0.05 - 2048 / 524288, columns=2048)
    index = pattern.estimate(q, q, SequenceShard.whole(config.train.seq_len), 1.0)
    work = tile_work(index, build_layout("striped", 128), 2)
    return 36 * [AttentionStats(0.05, 2048.0, [], imbalance(work), work, index)]


def told_of(
    monkeypatch: pytest.MonkeyPatch,
    config: Config,
    model: Any,
    layers: Any,
    gpu: str,
    device: str,
    seconds: float,
) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(time_report, "device_name", lambda device: gpu)
    log = TimeLog(config, model, torch.device(device), told.append)
    log.step_done(100.0, layers)
    for _ in range(3):
        log.step_done(seconds, [])
    return told


def test_near_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, config: Config, model: Any, layers: Any
) -> None:
    told = told_of(monkeypatch, config, model, layers, "NVIDIA H200", "cuda", MEASURED)
    predicted = predict_seconds(config, model, layers, rates_of("h200"), node_size=2)
    assert predicted == pytest.approx(MEASURED, rel=0.1)
    assert told == [
        f"seconds a step, predicted: {predicted:.2f}",
        f"seconds a step, measured: 17.70, {MEASURED / predicted:.2f} of what was predicted",
    ]


@pytest.mark.parametrize("seconds", [12.0, 25.0])
def test_far_from_it(
    monkeypatch: pytest.MonkeyPatch, config: Config, model: Any, layers: Any, seconds: float
) -> None:
    told = told_of(monkeypatch, config, model, layers, "NVIDIA H200", "cuda", seconds)
    assert len(told) == 2 and "more than 20% apart" in told[1] and "bench rates" in told[1]


def test_unknown_gpus_and_none(
    monkeypatch: pytest.MonkeyPatch, config: Config, model: Any, layers: Any
) -> None:
    assert told_of(monkeypatch, config, model, layers, "cpu", "cpu", 1.0) == []
    told = told_of(monkeypatch, config, model, layers, "NVIDIA A100", "cuda", 1.0)
    assert len(told) == 1 and "no rates of NVIDIA A100" in told[0]


def test_links_that_nobody_measured(
    monkeypatch: pytest.MonkeyPatch, config: Config, model: Any, layers: Any
) -> None:
    """One GPU a machine: the keys would travel between machines."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    told = told_of(monkeypatch, config, model, layers, "NVIDIA H200", "cuda", MEASURED)
    assert len(told) == 1 and "links between machines were not measured" in told[0]


def test_sequences_of_a_step(config: Config, model: Any, layers: Any) -> None:
    """Four sequences one after the other take four times as long, but for the optimizer."""
    four = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": 4})})
    one = predict_seconds(config, model, layers, rates_of("h200"), node_size=2)
    assert predict_seconds(four, model, layers, rates_of("h200"), node_size=2) == pytest.approx(
        4 * one, rel=0.01
    )


def test_a_run_tells_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, shards: Path
) -> None:
    """A real run, on a CPU that says it is a GPU of known rates: both lines, and that they are far apart."""

    class AsIfOnAGpu(TimeLog):
        def __init__(
            self, config: Config, model: Any, device: torch.device, tell: Any, policies: Any
        ) -> None:
            super().__init__(config, model, torch.device("cuda"), tell, policies)

    known = rates_of("h200")
    attention = dict.fromkeys((8, 16, 32), known.attention[128])
    monkeypatch.setattr(time_report, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(time_report, "rates_of_device", lambda name: replace(known, attention=attention))
    monkeypatch.setattr("mtraining.train.loop.TimeLog", AsIfOnAGpu)
    train(tiny_config(tmp_path / "run", shards, train={"steps": 3}))
    said = capfd.readouterr().out
    assert "seconds a step, predicted: " in said
    assert "seconds a step, measured: " in said and "more than 20% apart" in said
