"""`recompute: auto` on a GPU: a step fits where it was said to, and mixed layers learn the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_step_gpu import steps

from library_warnings import COMPILE
from mtraining.model.recompute import PARTS, LayerPolicy
from mtraining.train.mesh import Process
from mtraining.train.recompute import gpu_memory
from processes import run_command

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings(*COMPILE)]
PROGRAM = Path(__file__).with_name("recompute_auto_program.py")
ATTENTION = LayerPolicy(frozenset({"attention"}))
MIXED = [
    LayerPolicy(frozenset(PARTS), offload=True),
    LayerPolicy(frozenset(PARTS)),
    LayerPolicy(everything=True),
]


@pytest.mark.parametrize("fused", ["none", "liger"])
@pytest.mark.parametrize("share", [0.15, 0.6])
@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
def test_a_step_fits_where_it_was_said_to(fused: str, share: float, offload: bool) -> None:
    """PyTorch may take the predicted peak and what is kept free, not a byte more."""
    if fused == "liger":
        pytest.importorskip("liger_kernel")
    given = json.dumps({"share": share, "fused": fused, "offload": offload})
    done = run_command([sys.executable, str(PROGRAM), given])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["kinds"] > 1, found["policies"]
    assert 0.9 * found["predicted"] < found["measured"] < 1.03 * found["predicted"], found
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.parametrize("fused", ["none", "liger"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_that_keep_different_things_learn_the_same(process: Process, fused: str, family: str) -> None:
    """liger-kernel's rotary embedding overwrites products that are kept; its gate does so in backward."""
    if fused == "liger":
        pytest.importorskip("liger_kernel")
    expected, _ = steps(process, 3, family, recompute="none", fused=fused)
    found, _ = steps(process, 3, family, recompute=MIXED, fused=fused)
    assert [(one.loss, one.grad_norm) for one in found] == [(one.loss, one.grad_norm) for one in expected]


def test_compiled_layers_that_keep_different_things(process: Process) -> None:
    expected, _ = steps(process, 3, recompute="keep_attention", fused="compile")
    policies = [LayerPolicy(), ATTENTION, LayerPolicy(everything=True)]
    found, _ = steps(process, 3, recompute=policies, fused="compile")
    for one, other in zip(expected, found, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-3)


def test_a_limit_of_pytorch_is_what_there_is() -> None:
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    assert gpu_memory(device) <= total
    if not hasattr(torch.cuda, "get_per_process_memory_fraction"):
        pytest.skip("this PyTorch does not tell its limit")
    torch.cuda.set_per_process_memory_fraction(0.25, device)
    try:
        assert gpu_memory(device) == pytest.approx(0.25 * total)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
