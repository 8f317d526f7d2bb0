"""Nothing is read before it has arrived, and nothing is written while it is sent.

On a GPU either would be wrong only sometimes. Here buffers on their way hold NaN until they are waited for, and what
was sent is compared with what it was.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.layout import build_layout
from mtraining.pattern import build_pattern
from mtraining.ring import sparse_ring_attention, topology
from mtraining.ring.topology import Hop, PendingSum

SIZE = 8
PATTERNS: dict[str, dict[str, Any]] = {
    "vertical_slash": {"top_p": None, "top_k_columns": 12, "top_k_slashes": 20, "sinks": 2, "window": 4},
    "moba": {"chunk": 16, "top_k": 2},
    "dense": {},
}
under_way: list[object] = []


class CheckedHop(Hop):
    def __init__(self, payload: Tensor, *to: Any) -> None:
        super().__init__(payload, *to)
        self._sent = payload.clone()
        self._arriving, self._received = self._received, torch.full_like(self._received, torch.nan)
        under_way.append(self)

    def wait(self) -> Tensor:
        under_way.remove(self)  # once
        assert torch.equal(self._payload, self._sent), "written while it was sent"
        shown = super().wait()
        assert shown.isnan().all(), "written before it arrived"
        return shown.copy_(self._arriving)


class CheckedSum(PendingSum):
    def __init__(self, x: Tensor, group: dist.ProcessGroup | None) -> None:
        super().__init__(x.clone(), group)
        self._shown = x.fill_(torch.nan)
        under_way.append(self)

    def wait(self) -> Tensor:
        under_way.remove(self)
        assert self._shown.isnan().all(), "written before it arrived"
        return self._shown.copy_(super().wait())


def attention_job(worker: Worker, shape: tuple[int, ...], name: str) -> bool:
    """Whether out and all gradients are, bit for bit, those of a run that nobody checked."""
    mesh = worker.ring_mesh(shape)
    generator = torch.Generator().manual_seed(worker.rank)
    q, k, v, dout = (torch.randn(2, 4 * SIZE, heads, 16, generator=generator) for heads in (4, 2, 2, 4))
    layout = build_layout("zigzag" if name == "dense" else "striped", SIZE)
    results: list[list[Tensor]] = []
    for checked in (False, True):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        with pytest.MonkeyPatch.context() as patch:
            if checked:
                patch.setattr(topology, "Hop", CheckedHop)
                patch.setattr(topology, "PendingSum", CheckedSum)
            pattern = build_pattern(name, block_size=SIZE, **PATTERNS[name])
            out = sparse_ring_attention(*given, pattern=pattern, layout=layout, mesh=mesh, kernel="reference")
            out.backward(dout)
        results.append([out.detach(), *(x.grad for x in given if x.grad is not None)])
    assert not under_way, "never waited for"
    return all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2), (3, 2), (4, 1)], ids=str)
def test_transfers_are_left_alone(pool: ProcessPool, shape: tuple[int, ...], name: str) -> None:
    assert all(pool.run(attention_job, world=math.prod(shape), shape=shape, name=name))
