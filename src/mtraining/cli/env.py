"""`mtraining env`: what a report of a problem needs to say about the machine and the installation."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib import metadata
from typing import Annotated, Any

import typer

PACKAGES = (
    "mtraining", "torch", "triton", "transformers", "tokenizers", "datasets", "safetensors", "numpy", "pydantic",
    "flash-attn-4", "liger-kernel",
)  # fmt: skip
# Variables that change what a run does. Nothing else of the environment is shown: it may hold secrets.
VARIABLES = re.compile(
    r"(NCCL|TORCH_NCCL|TORCHINDUCTOR|GLOO|TRITON|FLASH_ATTENTION|MTRAINING|PYTORCH)_\w+"
    r"|CUDA_VISIBLE_DEVICES|CUDA_LAUNCH_BLOCKING|CUBLAS_WORKSPACE_CONFIG|OMP_NUM_THREADS|HF_HUB_OFFLINE|HF_HOME"
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)


def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Print versions, commit, GPUs, their links and the variables that matter: what a report needs."""
    facts = describe()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    for title, content in facts.items():
        typer.echo(f"{title}:")
        for line in _lines(content):
            typer.echo(f"  {line}")


def describe() -> dict[str, Any]:
    """The facts by subject: mappings of words, and lists of them."""
    return {
        "mtraining": _program(),
        "machine": _machine(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": _cuda(),
        "gpus": _gpus(),
        "links": _links(),
        "variables": {
            name: os.environ[name]
            for name in sorted(os.environ)
            if VARIABLES.fullmatch(name) and not SECRET.search(name)
        },
    }


def _program() -> dict[str, str]:
    from mtraining.bench.record import code_version
    from mtraining.errors import UserError

    try:
        return {"commit": code_version()}
    except UserError:
        return {"commit": "not known"}


def _machine() -> dict[str, str]:
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpus": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> dict[str, str]:
    """What torch was built with, the driver, and the attention kernels that `train.kernel: auto` takes in bf16."""
    import torch

    from mtraining.kernel import select_backend

    found = {"torch built with": torch.version.cuda or "no CUDA"}
    driver = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["driver"] = driver.splitlines()[0] if driver else "none"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    try:
        found["kernel: auto"] = select_backend("auto", device, torch.bfloat16, 128).name
    except Exception as error:  # a report says what is broken, whatever it is
        found["kernel: auto"] = f"fails: {error}"
    return found


def _gpus() -> list[str]:
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        found.append(f"{number}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return found


def _links() -> list[str]:
    """How the GPUs of this machine are joined: nvidia-smi's table, else which pairs reach each other's memory."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return []
    table = _said_by("nvidia-smi", "topo", "-m")
    if table:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", table)
        return [line.rstrip() for line in plain.splitlines() if line.strip()]
    return [
        f"{a} - {b}: {'direct' if torch.cuda.can_device_access_peer(a, b) else 'through the host'}"
        for a in range(count)
        for b in range(a + 1, count)
    ]


def _said_by(*words: str) -> str:
    """What a program prints; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _lines(content: dict[str, str] | list[str]) -> list[str]:
    lines = [f"{name}: {value}" for name, value in content.items()] if isinstance(content, dict) else content
    return lines or ["none"]
