"""The jobs that test rings over NCCL find nothing wrong over gloo; some of them, since each other is one of these."""

from __future__ import annotations

import pytest

from distributed import ProcessPool
from ring_jobs import run_job


@pytest.mark.parametrize(
    "name",
    [
        "attention, 2x2, striped, 9/3 heads of 64",
        "documents, flat, striped",
        "window, 2x2, contiguous",
        "rings agree, 9/3 heads",
        "behind slow links, flat",
        "training step, dp2xcp2",
    ],
)
def test_nothing_is_wrong_on_cpus(pool: ProcessPool, name: str) -> None:
    assert run_job(pool, name) == []
