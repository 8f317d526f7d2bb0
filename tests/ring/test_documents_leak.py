"""Changing one document changes nothing of another: outputs and gradients keep every bit, in every layout.

The index is fixed, so that the test holds for whatever a pattern chooses; what patterns choose is their own tests'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.pattern import Pattern, SequenceShard
from mtraining.ring import Ring, sparse_ring_attention
from starts_cases import of_documents

SIZE, TOKENS = 8, 128
LENGTHS = {"at blocks": (40, 24, 64), "anywhere": (37, 1, 53, 37)}
LARGE = [pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((4,), (2, 4))]


@dataclass(frozen=True)
class Fixed(Pattern):
    """The same random index whatever the queries and keys: diagonals and columns or, ``listed``, block lists."""

    block_size: int = SIZE
    listed: bool = False
    name = "fixed"

    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        chosen = torch.Generator().manual_seed(3)
        n, heads = shard.seq_len // SIZE, (q.shape[0], q.shape[2])
        if self.listed:
            blocks = torch.rand(*heads, n, n, generator=chosen) < 0.6
            return shard.block_index(SIZE, blocks[:, :, shard.all_blocks(SIZE)[shard.comm.rank]])
        diagonals = torch.rand(*heads, n, generator=chosen) < 0.6
        columns = torch.rand(*heads, shard.seq_len, generator=chosen).topk(24, -1).indices.sort(-1).values
        return SparseIndex(shard.seq_len, SIZE, diagonals, columns.int())


def run_job(
    worker: Worker, topology: tuple[int, ...], layout: str, lengths: tuple[int, ...], listed: bool, changed: int | None,
    bounded: bool,
) -> tuple[int, list[Tensor]]:  # fmt: skip
    """The rank in the ring, and out, dq, dk and dv of its tokens; document ``changed`` holds other tokens."""
    mesh = None
    if math.prod(topology) > 1:
        mesh = worker.mesh() if len(topology) == 1 else worker.mesh(topology, ("cp_outer", "cp_inner"))
    dealt, rank = build_layout(layout, SIZE), Ring.over(mesh).rank
    generator = torch.Generator().manual_seed(5)
    whole = [torch.randn(1, TOKENS, heads, 16, generator=generator) for heads in (4, 2, 2, 4)]
    if changed is not None:
        begin = sum(lengths[:changed])
        for x in whole:
            x[:, begin : begin + lengths[changed]] *= -3
    q, k, v, dout = (dealt.shard(x, rank, worker.world) for x in whole)
    for x in (q, k, v):
        x.requires_grad_()
    out = sparse_ring_attention(
        q, k, v, pattern=Fixed(listed=listed), layout=dealt, mesh=mesh, kernel="reference",
        starts=of_documents(lengths) if bounded else None,
    )  # fmt: skip
    return rank, [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def results(pool: ProcessPool, topology: tuple[int, ...], layout: str, **case: Any) -> list[Tensor]:
    """out, dq, dk and dv of the whole sequence."""
    ranks = sorted(
        pool.run(run_job, world=math.prod(topology), topology=topology, layout=layout, **case),
        key=lambda result: result[0],
    )
    return [build_layout(layout, SIZE).unshard([tensors[i] for _, tensors in ranks]) for i in range(4)]


@pytest.mark.parametrize("listed", [False, True], ids=["diagonals and columns", "lists"])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("topology", [(1,), (2,), (2, 2), *LARGE], ids=str)
def test_no_bit_leaks(
    pool: ProcessPool, topology: tuple[int, ...], layout: str, name: str, listed: bool
) -> None:
    lengths = LENGTHS[name]
    case = {"topology": topology, "layout": layout, "lengths": lengths, "listed": listed, "bounded": True}
    before = results(pool, **case, changed=None)
    for changed in range(len(lengths)):
        after = results(pool, **case, changed=changed)
        begin = sum(lengths[:changed])
        inside = torch.zeros(TOKENS, dtype=torch.bool)
        inside[begin : begin + lengths[changed]] = True
        for what, a, b in zip(("out", "dq", "dk", "dv"), before, after, strict=True):
            assert torch.equal(a[:, ~inside], b[:, ~inside]), f"{what} of another document changed"
        assert not torch.equal(before[0][:, inside], after[0][:, inside])


@pytest.mark.parametrize("listed", [False, True], ids=["diagonals and columns", "lists"])
def test_without_starts_documents_do_leak(pool: ProcessPool, listed: bool) -> None:
    """So the test above can fail."""
    case = {"topology": (1,), "layout": "contiguous", "lengths": LENGTHS["anywhere"], "listed": listed}
    before, after = (results(pool, **case, bounded=False, changed=changed) for changed in (None, 0))
    for a, b in zip(before[:2], after[:2], strict=True):
        assert not torch.equal(a[:, 37:], b[:, 37:])
