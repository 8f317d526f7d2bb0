"""The timeline on a GPU: what a wait costs is told from computing by events, and nothing waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from library_warnings import SYNC_CHECKS
from mtraining.ring import Timeline
from mtraining.ring.links import _cycles_per_second
from mtraining.ring.timeline import begin_step, timed_pass, waiting

pytestmark = pytest.mark.gpu

COMPUTE, TRANSFER = 0.02, 0.05  # seconds


def spin(seconds: float) -> None:
    torch.cuda._sleep(round(seconds * _cycles_per_second(torch.device("cuda", torch.cuda.current_device()))))


@timed_pass("forward")
def two_steps(x: Tensor, transfer: float) -> None:
    """A transfer on a stream of its own under the first step's computing; the second step needs it."""
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        spin(transfer)
    begin_step()
    spin(COMPUTE)
    with waiting():
        torch.cuda.current_stream().wait_stream(other)
    begin_step()
    spin(COMPUTE)


@pytest.mark.filterwarnings(SYNC_CHECKS)
def test_exposed_is_what_computing_did_not_hide() -> None:
    x = torch.ones(1, device="cuda")
    two_steps(x, COMPUTE)  # measures the clock; the first stream takes milliseconds to make
    torch.cuda.synchronize()
    with Timeline() as timeline:
        torch.cuda.set_sync_debug_mode("error")
        try:
            two_steps(x, TRANSFER)
            two_steps(x, COMPUTE / 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    exposed, hidden = timeline.passes
    assert exposed.compute == pytest.approx([COMPUTE, COMPUTE], rel=0.15)
    assert exposed.exposed == pytest.approx([TRANSFER - COMPUTE, 0], rel=0.15, abs=1e-3)
    assert hidden.exposed == pytest.approx([0, 0], abs=1e-3)
