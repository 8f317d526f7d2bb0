"""The Triton kernels without a GPU: in Triton's interpreter, compiled for real targets, and the choice of backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mtraining.errors import UserError
from mtraining.kernel import select_backend

pytest.importorskip("triton")


def test_kernels_in_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when it is imported, so these tests get a process of their own."""
    folder = Path(__file__).parent / "triton_interpreter"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_triton_is_refused_on_the_cpu_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"kernel: 'triton' needs an NVIDIA GPU, not cpu.*kernel=reference"):
        select_backend("triton", torch.device("cpu"), torch.float32, 64)


def test_auto_says_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        backend = select_backend("auto", torch.device("cpu"), torch.float32, 48)
    assert backend.name == "reference, dense flash"
    assert (
        "auto chose 'reference' for cpu, torch.float32, head_dim 48: the only backend on cpu" in caplog.text
    )
    assert "for dense attention 'flash': the fastest there is; 'flash4' needs an NVIDIA GPU" in caplog.text
