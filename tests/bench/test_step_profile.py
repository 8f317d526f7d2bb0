"""The profile of a step: a tiny one on a CPU, and how the events of a GPU's trace are told apart."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from processes import run_command

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_profile.py"


@pytest.mark.slow
def test_every_part_of_a_tiny_step_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--model", "tiny", "--layers", "1", "--seq-len", "256"]
    command += ["--density", "0.4", "--steps", "1", "--out", str(tmp_path)]
    run_command(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with next(tmp_path.glob("profile-cpu-*.csv")).open() as file:
        times = {row["component"]: float(row["ms"]) for row in csv.DictReader(file)}
    parts = {
        "attention forward", "attention backward", "estimation", "loss", "optimizer", "matmuls of layers",
        "norms, rotary, gated MLP, sums", "FSDP copies", "step",
    }  # fmt: skip
    assert parts <= times.keys()
    assert all(times[part] > 0 for part in parts)


def launch(start: float, number: int, thread: int = 1) -> dict[str, Any]:
    event = around("cuLaunchKernelEx", start, start + 1, thread)
    return {**event, "cat": "cuda_driver", "args": {"correlation": number}}


def around(name: str, start: float, end: float, thread: int = 1) -> dict[str, Any]:
    return {"cat": "user_annotation", "name": name, "pid": 1, "tid": thread, "ts": start, "dur": end - start}


def kernel(name: str, number: int, start: float, end: float, what: str = "kernel") -> dict[str, Any]:
    return {"cat": what, "name": name, "ts": start, "dur": end - start, "args": {"correlation": number}}


def test_kernels_belong_to_what_launched_them(script: Callable[[str], ModuleType]) -> None:
    profile = script("step_profile")
    events = [
        around("part:loss", 10, 20), launch(12, 1), launch(21, 2), launch(13, 3, thread=2),
        around("part:attention forward", 30, 40, 2), around("nccl:sendrecv", 31, 90, 2), launch(32, 4, 2),
        around("FSDP::all_gather", 50, 60), launch(51, 5), launch(52, 6),
        around("Optimizer.step#AdamW.step", 70, 80), launch(71, 7), launch(95, 8), launch(96, 9),
        kernel("nvjet_tst_128x256", 1, 100, 110), kernel("nvjet_tst_128x256", 2, 110, 120),
        kernel("triton_red_fused_mean", 3, 120, 125), kernel("ncclDevKernel_SendRecv", 4, 105, 135),
        kernel("ncclDevKernel_AllGather", 5, 120, 130), kernel("chunk_cat", 6, 140, 141),
        kernel("multi_tensor_apply", 7, 141, 142), kernel("Memcpy DtoD", 9, 142, 143, "gpu_memcpy"),
        kernel("Memcpy DtoH (Device -> Pinned)", 8, 100, 137, "gpu_memcpy"),
    ]  # fmt: skip
    found = list(profile.pieces(events, on_gpu=True))
    elementwise = "norms, rotary, gated MLP, sums"
    assert [name for name, _, _ in found] == [
        "loss", "matmuls of layers", elementwise, "ring transfers", "FSDP transfers", "FSDP copies", "optimizer",
        elementwise, "offload and batch copies",
    ]  # fmt: skip
    rows = profile.summary(found, 0.05, on_gpu=True)
    assert rows["ring transfers"] == pytest.approx(0.030)
    assert rows["transfers not hidden"] == pytest.approx(0.012)  # from 125 to 137
    assert rows["idle"] == pytest.approx(0.003)  # from 137 to 140
    assert rows["profiled step"] == pytest.approx(0.043)
