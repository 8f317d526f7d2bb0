"""Timing on a GPU: work of a known number of cycles."""

from __future__ import annotations

import time

import pytest
import torch

from mtraining.bench.timing import measure

pytestmark = pytest.mark.gpu
CYCLES = 4_000_000


def test_time_and_clock_give_the_cycles() -> None:
    begin = time.perf_counter()
    timing = measure(lambda: torch.cuda._sleep(CYCLES), torch.device("cuda"), 0.1, warm_up=0.3)
    assert time.perf_counter() - begin > 0.3
    assert 1 < timing.ms < 12  # at 350 MHz to 4 GHz
    if timing.sm_mhz is not None:  # nvidia-ml-py is there
        assert timing.ms * timing.sm_mhz * 1000 == pytest.approx(CYCLES, rel=0.1)
