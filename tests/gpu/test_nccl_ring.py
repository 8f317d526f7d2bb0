"""Rings of four ranks over NCCL, on however few GPUs: attention, slow links, memory used again, whole steps.

With one GPU each rank is a node of its own; with two, ranks 0, 1 and 2, 3 are nodes with NVLink inside and sockets
between (see `mtraining.bench.processes.share_gpus`).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distributed import ProcessPool
from ring_jobs import JOBS, run_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpus"),  # one pool of processes
    pytest.mark.filterwarnings(
        "default"
    ),  # the workers' too: what libraries warn of there is not what is tested
]


@pytest.fixture(scope="module")
def gpus() -> Iterator[ProcessPool]:
    made = ProcessPool(on_gpu=True)
    yield made
    made.close()


@pytest.mark.parametrize("name", JOBS)
def test_four_ranks_over_nccl(gpus: ProcessPool, name: str) -> None:
    wrong = run_job(gpus, name)
    assert not wrong, "\n".join(wrong)
