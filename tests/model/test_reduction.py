"""Where reduced gradients are allocated; what they hold, every distributed gradient test compares."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from test_gradients import TOPOLOGIES, take
from tiny_models import DENSE, SPARSE, tiny_batch, tiny_model
from torch.distributed.fsdp import FSDPModule

from distributed import ProcessPool, Worker
from mtraining.layout import build_layout
from mtraining.model import parallelize
from mtraining.model.reduction import ReduceIntoFreed
from mtraining.pattern import build_pattern


def allocations(worker: Worker) -> tuple[int, int]:
    """Job: how many gradients one backward allocated through `ReduceIntoFreed`, and how many units FSDP2 has."""
    mesh = worker.mesh(*TOPOLOGIES["cp2"])
    layout = build_layout("striped", SPARSE["block_size"])
    model = parallelize(
        tiny_model("qwen2", "float32"), mesh, pattern=build_pattern(**DENSE), layout=layout, recompute="none"
    )
    batch = tiny_batch()
    loss = model(*take(batch, layout, mesh), batch.num_labels)
    seen: list[Any] = []
    real = ReduceIntoFreed.allocate

    def allocate(self: ReduceIntoFreed, size: Any, **how: Any) -> torch.Tensor:
        seen.append(size)
        return real(self, size, **how)

    with mock.patch.object(ReduceIntoFreed, "allocate", allocate):
        loss.backward()
    return len(seen), sum(isinstance(module, FSDPModule) for module in model.modules())


def test_every_unit_reduces_into_memory_of_the_default_stream(pool: ProcessPool) -> None:
    for seen, units in pool.run(allocations, world=2):
        assert seen == 2 * units  # what is sent, and the sum
