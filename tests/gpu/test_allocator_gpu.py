"""What is set for PyTorch's allocator is what PyTorch then does."""

from __future__ import annotations

import os
import sys

import pytest

from mtraining.model.allocator import VARIABLES
from processes import run_command

pytestmark = pytest.mark.gpu

PROGRAM = """
import torch, mtraining
if {started}:
    torch.cuda.get_device_capability()
    assert torch.cuda.is_initialized()
print(mtraining.use_expandable_segments())
kept = torch.empty(64 << 20, device="cuda")
print("expandable", sorted({{bool(segment["is_expandable"]) for segment in torch.cuda.memory_snapshot()}}))
"""


@pytest.mark.parametrize("options", [{}, {VARIABLES[0]: "expandable_segments:False"}], ids=["", "off"])
@pytest.mark.parametrize("started", [False, True], ids=["", "started"])
def test_segments_are_as_told(options: dict[str, str], started: bool) -> None:
    """Also where a library's import has started CUDA."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | options
    done = run_command([sys.executable, "-c", PROGRAM.format(started=started)], env=environment)
    assert f"expandable [{not options}]" in done.stdout
