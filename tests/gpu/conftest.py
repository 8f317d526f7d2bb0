"""What tests on a GPU share: a training process on it, and the end of a search for waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mtraining.train.mesh import Process


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    """A group of one process, with gloo and NCCL."""
    torch.cuda.set_device(0)  # or the mesh warns that it has to choose one
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cuda", (1, 1), mesh_dim_names=("dp", "cp"))
    yield Process(torch.device("cuda", 0), mesh, rank=0, world=1, dp_rank=0, cp_rank=0)
    dist.destroy_process_group()


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Waiting for the device is allowed again after the test, however it ends."""
    yield
    torch.cuda.set_sync_debug_mode("default")
