"""The CUDA allocator's options: set before CUDA starts, told, and never against the user's own. No GPU is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

import mtraining
from mtraining.bench.options import TrainOptions
from mtraining.bench.train import run as bench_run
from mtraining.model.allocator import EXPANDABLE, VARIABLES, reserve_share, segments_expand
from mtraining.train import mesh
from mtraining.train.config import parse_config

NEW = "PYTORCH_ALLOC_CONF"


class Started(Exception):
    """CUDA would start here."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Stand in for a machine with an NVIDIA GPU, where neither variable is set; the environment is restored."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


def start(*_: object) -> None:
    assert os.environ[NEW] == EXPANDABLE, "CUDA starts before the allocator is set"
    raise Started


def test_segments_expand_where_nothing_is_set(gpu: pytest.MonkeyPatch) -> None:
    told = mtraining.use_expandable_segments()
    assert os.environ[NEW] == EXPANDABLE and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    assert f"set {NEW}={EXPANDABLE}" in told and segments_expand()


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("value", ["max_split_size_mb:512", "expandable_segments:False", ""])
def test_the_users_options_stay_and_are_told(gpu: pytest.MonkeyPatch, name: str, value: str) -> None:
    gpu.setenv(name, value)
    told = mtraining.use_expandable_segments()
    assert {key: os.environ.get(key) for key in VARIABLES} == dict.fromkeys(VARIABLES) | {name: value}
    assert f"{name}={value}" in told and f"without {EXPANDABLE}" in told
    assert not segments_expand()


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_own_expandable_segments_count(gpu: pytest.MonkeyPatch, name: str) -> None:
    gpu.setenv(name, f"max_split_size_mb:512, {EXPANDABLE}")
    assert segments_expand() and "without" not in mtraining.use_expandable_segments()


def test_of_both_variables_pytorchs_older_name_counts(gpu: pytest.MonkeyPatch) -> None:
    """Read off PyTorch 2.11 on a GPU."""
    gpu.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    gpu.setenv(NEW, EXPANDABLE)
    assert not segments_expand()
    gpu.setenv("PYTORCH_CUDA_ALLOC_CONF", EXPANDABLE)
    gpu.setenv(NEW, "max_split_size_mb:512")
    assert segments_expand()


def test_where_cuda_has_started_the_allocator_itself_is_told(gpu: pytest.MonkeyPatch) -> None:
    """Importing torchao starts CUDA, and PyTorch reads the environment only then."""
    said: list[str] = []
    gpu.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    mtraining.use_expandable_segments()
    assert said == []  # PyTorch will read the environment
    gpu.delenv(NEW)
    gpu.setattr(torch.cuda, "is_initialized", lambda: True)
    told = mtraining.use_expandable_segments()
    assert said == [EXPANDABLE] and os.environ[NEW] == EXPANDABLE and f"set {NEW}={EXPANDABLE}" in told
    mtraining.use_expandable_segments()
    assert said == [EXPANDABLE]  # as the environment says since


@pytest.mark.parametrize("lacks", ["a GPU", "CUDA"])
def test_elsewhere_nothing_is_set_or_told(gpu: pytest.MonkeyPatch, lacks: str) -> None:
    if lacks == "CUDA":
        gpu.setattr(torch.version, "cuda", None)
    else:
        gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert mtraining.use_expandable_segments() == "" and NEW not in os.environ


def run_on(device: str, tmp_path: Path) -> None:
    sections = {"model": {"init": "none"}, "data": {"path": "none"}, "train": {"seq_len": 64, "steps": 1}}
    config = parse_config({"output": str(tmp_path), **sections, "distributed": {"device": device}})
    with mesh.joined_processes(config) as process:
        assert process.allocator == ""


def test_a_run_sets_it_before_cuda_starts(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu.setattr(torch.cuda, "set_device", start)
    with pytest.raises(Started):
        run_on("cuda", tmp_path)


def test_a_run_on_the_cpu_of_such_a_machine_sets_nothing(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_on("cpu", tmp_path)
    assert NEW not in os.environ


def test_bench_train_sets_it_before_cuda_starts(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu.setenv("RANK", "0")
    gpu.setattr(bench_run, "take_device", start)
    with pytest.raises(Started):
        bench_run.work(TrainOptions(device="cuda"), tmp_path / "progress")


def test_parallelize_sets_it_for_a_gpu_only(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "mtraining"):
        mtraining.parallelize(tiny_model("qwen2"), pattern="dense")
    assert NEW not in os.environ and EXPANDABLE not in caplog.text
    for parameter in (model := tiny_model("qwen2")).parameters():
        parameter.__class__ = OnGpu
    gpu.setattr("mtraining.model.parallel.check_supported", lambda model: None)  # it would run the model
    gpu.setattr("mtraining.model.parallel.select_backend", start)
    with caplog.at_level("INFO", "mtraining"), pytest.raises(Started):
        mtraining.parallelize(model, pattern="dense")
    assert EXPANDABLE in caplog.text


class OnGpu(torch.nn.Parameter):
    """A parameter that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def test_the_reserve_is_larger_without_expandable_segments(gpu: pytest.MonkeyPatch) -> None:
    small = reserve_share()
    gpu.setenv(NEW, "expandable_segments:False")
    assert small >= 40.9 / 40.0 - 1 and reserve_share() >= 20 / 113 > small  # both measured on H200s
