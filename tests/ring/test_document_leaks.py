"""Changing one document changes no other's outputs or gradients by a single bit: every pattern, layout and ring."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distributed import ProcessPool, Worker
from document_cases import NAMES, PACKED, TOKENS, pattern_of
from mtraining.layout import build_layout
from mtraining.ring import Ring, sparse_ring_attention
from pattern_cases import SIZE

HEADS = (4, 2, 2, 4)  # of q, k, v and dout


def tensors(seed: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(2, TOKENS, heads, 16, generator=made, dtype=torch.float64) for heads in HEADS]


def results(
    name: str, layout: str, starts: Tensor, given: list[Tensor], worker: Worker | None
) -> list[Tensor]:
    """out, dq, dk and dv in global order, the same on every rank."""
    dealt, mesh = build_layout(layout, SIZE), None
    if worker is not None:
        mesh = worker.mesh() if worker.world < 4 else worker.mesh((2, 2), ("cp_outer", "cp_inner"))
    ring = Ring.over(mesh)
    mine = [dealt.shard(x, ring.rank, ring.world).clone().requires_grad_() for x in given]
    q, k, v, dout = mine
    out = sparse_ring_attention(q, k, v, pattern=pattern_of(name), layout=dealt, mesh=mesh, starts=starts)
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
    return [dealt.unshard(list(ring.all_gather(x.contiguous()))) for x in found]


def leaks(name: str, layout: str, packed: str, worker: Worker | None = None) -> list[str]:
    """One sentence for every result of another document that changed with one document's queries, keys or values."""
    starts, plain, other = PACKED[packed], tensors(1), tensors(2)
    before, said = results(name, layout, starts, plain, worker), []
    # The two longest documents of the first sequence, and what stands at the same place in the second.
    firsts, sizes = starts[0].unique(return_counts=True)
    for first in firsts[sizes.argsort(descending=True)[:2]].tolist():
        mine = (starts == first)[..., None, None]
        after = results(
            name,
            layout,
            starts,
            [torch.where(mine, 3 * b, a) for a, b in zip(plain, other, strict=True)],
            worker,
        )
        for what, a, b in zip(("out", "dq", "dk", "dv"), before, after, strict=True):
            changed = (a != b).flatten(2).any(-1)
            if not changed[mine[..., 0, 0]].any():
                said.append(f"{what} of the document at {first} did not change itself")
            elif (changed & ~mine[..., 0, 0]).any():
                tokens = (changed & ~mine[..., 0, 0]).nonzero().tolist()
                said.append(f"{what} of {tokens} changed with the document at {first}")
    return said


@pytest.mark.parametrize(
    "packed", [key if key == "at blocks" else pytest.param(key, marks=pytest.mark.slow) for key in PACKED]
)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_leaks_in_one_process(name: str, packed: str) -> None:
    assert leaks(name, "contiguous", packed) == []


def leak_job(worker: Worker, layout: str, names: list[str]) -> list[str]:
    return [f"{name}: {said}" for name in names for said in leaks(name, layout, "anywhere", worker)]


# Of each kind of index one: columns and lists, lists alone, both with heads of two kinds, columns of two members.
QUICK = ["top_p", "moba", "flexprefill", "union"]


def test_nothing_leaks_over_two_ranks(pool: ProcessPool) -> None:
    for said in pool.run(leak_job, world=2, layout="striped", names=QUICK):
        assert said == []


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.parametrize("topology", [(2,), (2, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_nothing_leaks_over_a_ring(pool: ProcessPool, layout: str, topology: tuple[int, ...]) -> None:
    for said in pool.run(leak_job, world=math.prod(topology), layout=layout, names=NAMES):
        assert said == []
