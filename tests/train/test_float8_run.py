"""Runs in float8: near those in bf16, resumed with it and without, and refused before a model is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import raw_config, run_job, tensors

from distributed import ProcessPool
from mtraining.errors import UserError
from mtraining.train import loop
from mtraining.train.config import parse_config
from mtraining.train.export import export_run
from mtraining.train.loop import train
from mtraining.train.memory_report import predict_config
from mtraining.train.metrics import read_metrics
from mtraining.train.store import CheckpointStore


def raw(folder: Path, shards: Path, float8: Any, steps: int = 10, **sections: Any) -> dict[str, Any]:
    made = raw_config(folder, shards, **sections)
    made["train"] |= {"dtype": "bf16", "float8": float8, "steps": steps, "lr": 3e-3, "schedule": "constant"}
    made["checkpoint"] |= {"every": 0, "async": False}
    return made


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder)]


def test_float8_learns_as_bf16_does_and_what_is_saved_has_the_same_form(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for how in ("off", "emulated"):
        train(parse_config(raw(tmp_path / how, shards, how)))
    assert "float8, emulated: 14 linear layers of the decoder" in capsys.readouterr().out.splitlines()
    plain, found = losses(tmp_path / "off"), losses(tmp_path / "emulated")
    assert found == pytest.approx(plain, rel=0.02) and found != plain
    assert found[-1] < 0.9 * found[0]
    one, other = (
        tensors(CheckpointStore(tmp_path / how).path(10), tmp_path / f"{how}.pt")
        for how in ("off", "emulated")
    )
    assert {name: (value.shape, value.dtype) for name, value in one.items()} == {
        name: (value.shape, value.dtype) for name, value in other.items()
    }
    export_run(tmp_path / "emulated", tmp_path / "export")
    weights = load_file(tmp_path / "export" / "model.safetensors")
    assert len(weights) > 20
    for name, value in weights.items():
        (stored,) = (
            tensor for path, tensor in other.items() if f"'hf_model.{name}'" in path and "'model'" in path
        )
        assert torch.equal(value, stored)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("off", "emulated"),
        pytest.param("emulated", "off", marks=[pytest.mark.slow, pytest.mark.sweep]),
        pytest.param("emulated", "emulated", marks=[pytest.mark.slow, pytest.mark.sweep]),
    ],
)
def test_a_run_goes_on_with_float8_and_without(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str], first: str, then: str
) -> None:
    train(parse_config(raw(tmp_path / "parts", shards, first, steps=3)))
    train(parse_config(raw(tmp_path / "parts", shards, then, steps=6)))
    train(parse_config(raw(tmp_path / "whole", shards, first, steps=6)))
    told = f"train.float8: {first} -> {then} from step 4 on" in capsys.readouterr().out
    parts, whole = losses(tmp_path / "parts"), losses(tmp_path / "whole")
    assert parts[:3] == whole[:3] and parts == pytest.approx(whole, rel=0.01)
    assert told == (first != then) == (parts != whole)


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(tmp_path: Path, shards: Path, pool: ProcessPool) -> None:
    """Two replicas have the sequences of two micro-batches of one process."""
    sizes = {"batch_size": 2, "micro_batch_size": 1}
    one, two = raw(tmp_path / "one", shards, "emulated", 5), raw(tmp_path / "two", shards, "emulated", 5)
    two["parallel"] = {"dp": 2}
    for each in (one, two):
        each["train"] |= sizes
    pool.run(run_job, world=2, raw=two)
    train(parse_config(one))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)


def test_what_cannot_run_is_refused_before_the_model_is_built(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "build_weights", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(UserError, match="train.float8=rowwise needs an NVIDIA GPU, not cpu"):
        train(parse_config(raw(tmp_path / "run", shards, "rowwise")))
    lora = raw(tmp_path / "run", shards, "emulated")
    lora["model"]["lora"] = {"r": 4}
    with pytest.raises(UserError, match="train.float8=emulated does not go with model.lora"):
        train(parse_config(lora))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    process: Any = type("Process", (), {"device": torch.device("cuda", 0)})
    with pytest.raises(UserError, match=r"NVIDIA A100 has 8\.0"):
        loop.parallel_model(parse_config(raw(tmp_path / "run", shards, "rowwise")), process)


def test_a_bare_off_of_yaml_is_off(tmp_path: Path, shards: Path) -> None:
    assert parse_config(raw(tmp_path / "run", shards, False)).train.float8 == "off"


def test_a_dry_run_counts_copies_in_float8_and_needs_no_gpu(tmp_path: Path, shards: Path) -> None:
    def predicted(how: str) -> Any:
        config = raw(tmp_path / "run", shards, how)
        config["model"]["config"] |= {"hidden_size": 256, "intermediate_size": 1024}
        config["train"] |= {"seq_len": 4096, "recompute": "none", "fused": "liger"}
        return predict_config(parse_config(config))

    plain, float8 = predicted("off"), predicted("rowwise")
    backward = "in the last layer's backward"
    assert float8.components.keys() == plain.components.keys()
    assert float8.moments[backward] > plain.moments[backward]
    # Nothing more is kept, and of one product at a time there are copies in a byte a number.
    copies = 2 * 4096 * (2 * 1024 + 256) + 2 * 256 * 1024
    assert float8.moments[backward] - plain.moments[backward] <= copies
    assert float8.moments["in the loss"] == plain.moments["in the loss"]
