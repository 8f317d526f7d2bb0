"""What a run folder says of where the run was made, and of its start: `about.json`, written anew at each resume."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mtraining.inputs.text import replace_text
from mtraining.predict.memory import Prediction

ABOUT = "about.json"
PACKAGES = ("mtraining", "torch", "triton", "transformers", "numpy", "flash-attn-4", "liger-kernel")


def environment(device: torch.device, world: int) -> dict[str, str]:
    """Versions and devices by what they are called, of this process."""
    found = {"system": platform.platform(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["processes"] = str(world)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found["device"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        found["CUDA of torch"] = torch.version.cuda or "none"
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        found["device"] = f"CPU, {os.cpu_count()} cores"
    return found


def write_about(
    run: Path,
    device: torch.device,
    world: int,
    prediction: Prediction | None,
    start: dict[str, Any] | None = None,
) -> None:
    """Write the environment, and the memory that a step is predicted to take on a GPU, in bytes.

    Args:
        start: what the start took, once that is known: what `mtraining.train.start.StartLog.step_done` returns.
    """
    about: dict[str, Any] = {"environment": environment(device, world), "measured_on": device.type}
    if prediction is not None:
        about["memory_predicted"] = {"peak": prediction.peak, "components": dict(prediction.components)}
    if start is not None:
        about["start"] = start
    replace_text(run / ABOUT, json.dumps(about, indent=1) + "\n")
