"""What is set for PyTorch's allocator is what PyTorch then does."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from test_step_gpu import batches, make
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from mtraining.model import parallel
from mtraining.model.allocator import VARIABLES
from mtraining.train.mesh import Process
from mtraining.train.moments import local
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


SHORT = """
import torch, mtraining
from mtraining.model.allocator import shortages
mtraining.use_expandable_segments()
device = torch.device("cuda", 0)
torch.cuda.set_per_process_memory_fraction(0.1)
room = int(0.1 * torch.cuda.get_device_properties(device).total_memory)
first = torch.empty(int(0.6 * room), dtype=torch.uint8, device=device)
print("with room", shortages(device))
del first  # kept for its own stream
with torch.cuda.stream(torch.cuda.Stream()):
    other = torch.empty(int(0.6 * room), dtype=torch.uint8, device=device)
print("without", shortages(device))
"""


def test_memory_that_had_to_be_given_back_is_counted() -> None:
    done = run_command([sys.executable, "-c", SHORT])
    assert "with room 0" in done.stdout and "without 1" in done.stdout


@pytest.mark.parametrize("options", [{}, {VARIABLES[0]: "expandable_segments:False"}], ids=["", "off"])
@pytest.mark.parametrize("started", [False, True], ids=["", "started"])
def test_segments_are_as_told(options: dict[str, str], started: bool) -> None:
    """Also where a library's import has started CUDA."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | options
    done = run_command([sys.executable, "-c", PROGRAM.format(started=started)], env=environment)
    assert f"expandable [{not options}]" in done.stdout


def gradients(process: Process) -> tuple[list[Tensor], int, int]:
    """Of one backward: the gradients, their bytes, and the bytes in use that only other streams may use again."""
    model = make(process, recompute="none")
    batch = {name: x.to(process.device) for name, x in next(batches()).items()}
    labels = batch["labels"]
    model(batch["input_ids"], batch["position_ids"], labels, labels.numel()).backward()
    torch.cuda.synchronize()
    found = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    elsewhere = sum(part["allocated_size"] for part in torch.cuda.memory_snapshot() if part["stream"] != 0)
    return [one.clone() for one in found], sum(one.nbytes for one in found), elsewhere


def test_gradients_lie_where_activations_did(process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2's own way has them in memory of another stream. The numbers are the same."""
    found, size, elsewhere = gradients(process)
    assert elsewhere < 0.1 * size
    monkeypatch.setattr(parallel, "ReduceIntoFreed", DefaultReduceScatter)
    expected, size, elsewhere = gradients(process)
    assert elsewhere > 0.9 * size
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
