"""The Triton kernels without a GPU: in Triton's interpreter, compiled for real targets, and the choice of backend."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from mtraining.errors import UserError
from mtraining.kernel import select_backend
from processes import run_command

pytest.importorskip("triton")


FOLDER = Path(__file__).parent / "triton_interpreter"
# Of each family of kernels the cheapest test that compares all of its results with the reference.
CORE = [
    "test_triton_attention.py::test_fp32[whole]",
    "test_triton_attention.py::test_fp16[block mask]",
    "test_hopper_machine.py::test_against_reference[columns only-4]",
    "test_hopper_machine.py::test_against_reference[no columns-4]",
    "test_estimate.py::test_heaviest_of_random_masses[0.9]",
    "test_estimate.py::test_columns[dtype0-4-1-64]",
    "test_estimate.py::test_probe[striped-32-2-384-3-1-32-20-last-1]",
    "test_flash4_wiring.py::test_lists_merge_and_global_delta_give_the_reference[zigzag, own keys]",
]


def interpret(*arguments: str) -> None:
    """Run tests in a process of their own: Triton reads TRITON_INTERPRET when it is imported."""
    done = run_command(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=FOLDER,
        limit=550,
    )
    assert " passed" in done.stdout


def test_core_kernels_in_the_interpreter() -> None:
    interpret(*CORE)


# A file at a time, so that the suite's workers share them.
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(file.name for file in FOLDER.glob("test_*.py")))
def test_kernels_in_the_interpreter(name: str) -> None:
    interpret(name, *(f"--deselect=tests/kernel/triton_interpreter/{test}" for test in CORE))


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
