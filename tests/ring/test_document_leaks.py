"""Changing one document changes no other's outputs or gradients by a single bit, on every layout and ring.

First under one index whatever the queries and keys, then under every pattern, which chooses its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed import ProcessPool, Worker
from document_cases import NAMES, PACKED, TOKENS, pattern_of
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.pattern import Pattern, SequenceShard
from mtraining.ring import Ring, sparse_ring_attention
from pattern_cases import SIZE
from starts_cases import of_documents

HEADS = (4, 2, 2, 4)  # of q, k, v and dout
RESULTS = ("out", "dq", "dk", "dv")


def tensors(seed: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, TOKENS, heads, 16, generator=made, dtype=dtype) for heads in HEADS]


def results(
    pattern: Pattern, layout: str, starts: Tensor | None, given: list[Tensor], mesh: Any, kernel: str = "auto"
) -> list[Tensor]:
    """out, dq, dk and dv in global order, the same on every rank."""
    dealt, ring = build_layout(layout, SIZE), Ring.over(mesh)
    q, k, v, dout = (dealt.shard(x, ring.rank, ring.world).clone().requires_grad_() for x in given)
    out = sparse_ring_attention(
        q, k, v, pattern=pattern, layout=dealt, mesh=mesh, kernel=kernel, starts=starts
    )
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
    return [dealt.unshard(list(ring.all_gather(x.contiguous()))) for x in found]


# -- one index, whatever a pattern would choose ------------------------------------------------------------------------

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


def fixed_job(
    worker: Worker, topology: tuple[int, ...], layout: str, lengths: tuple[int, ...], listed: bool, changed: int | None,
    bounded: bool,
) -> list[Tensor]:  # fmt: skip
    """out, dq, dk and dv of the whole sequence; document ``changed`` holds other tokens."""
    given = tensors(5, 1, torch.float32)
    if changed is not None:
        begin = sum(lengths[:changed])
        for x in given:
            x[:, begin : begin + lengths[changed]] *= -3
    mesh = None if math.prod(topology) == 1 else worker.ring_mesh(topology)
    starts = of_documents(lengths) if bounded else None
    return results(Fixed(listed=listed), layout, starts, given, mesh, "reference")


def under_fixed(pool: ProcessPool, topology: tuple[int, ...], **case: Any) -> list[Tensor]:
    found: list[Tensor] = pool.run(fixed_job, world=math.prod(topology), topology=topology, **case)[0]
    return found


@pytest.mark.parametrize("listed", [False, True], ids=["diagonals and columns", "lists"])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("topology", [(1,), (2,), (2, 2), *LARGE], ids=str)
def test_no_bit_leaks(
    pool: ProcessPool, topology: tuple[int, ...], layout: str, name: str, listed: bool
) -> None:
    lengths = LENGTHS[name]
    case = {"topology": topology, "layout": layout, "lengths": lengths, "listed": listed, "bounded": True}
    before = under_fixed(pool, **case, changed=None)
    for changed in range(len(lengths)):
        after = under_fixed(pool, **case, changed=changed)
        begin = sum(lengths[:changed])
        inside = torch.zeros(TOKENS, dtype=torch.bool)
        inside[begin : begin + lengths[changed]] = True
        for what, a, b in zip(RESULTS, before, after, strict=True):
            assert torch.equal(a[:, ~inside], b[:, ~inside]), f"{what} of another document changed"
        assert not torch.equal(before[0][:, inside], after[0][:, inside])


@pytest.mark.parametrize("listed", [False, True], ids=["diagonals and columns", "lists"])
def test_without_starts_documents_do_leak(pool: ProcessPool, listed: bool) -> None:
    """So the test above can fail."""
    case = {"topology": (1,), "layout": "contiguous", "lengths": LENGTHS["anywhere"], "listed": listed}
    before, after = (under_fixed(pool, **case, bounded=False, changed=changed) for changed in (None, 0))
    for a, b in zip(before[:2], after[:2], strict=True):
        assert not torch.equal(a[:, 37:], b[:, 37:])


# -- every pattern, with what it chooses -------------------------------------------------------------------------------


def leaks(name: str, layout: str, packed: str, mesh: Any = None) -> list[str]:
    """One sentence for every result of another document that changed with one document's queries, keys or values."""
    pattern, starts = pattern_of(name), PACKED[packed]
    plain, other = ([2 * x for x in tensors(seed, 2, torch.float64)] for seed in (1, 2))
    before, said = results(pattern, layout, starts, plain, mesh), []
    # The two longest documents of the first sequence, and what stands at the same place in the second.
    firsts, sizes = starts[0].unique(return_counts=True)
    for first in firsts[sizes.argsort(descending=True)[:2]].tolist():
        mine = (starts == first)[..., None, None]
        given = [torch.where(mine, 3 * b, a) for a, b in zip(plain, other, strict=True)]
        after = results(pattern, layout, starts, given, mesh)
        for what, a, b in zip(RESULTS, before, after, strict=True):
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


def leak_job(worker: Worker, topology: tuple[int, ...], layout: str, names: list[str]) -> list[str]:
    mesh = worker.ring_mesh(topology)
    return [f"{name}: {said}" for name in names for said in leaks(name, layout, "anywhere", mesh)]


# Of each kind of index one: columns and lists, lists alone, both with heads of two kinds, columns of two members.
QUICK = ["top_p", "moba", "flexprefill", "union"]


def test_nothing_leaks_over_two_ranks(pool: ProcessPool) -> None:
    for said in pool.run(leak_job, world=2, topology=(2,), layout="striped", names=QUICK):
        assert said == []


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.parametrize("topology", [(2,), (2, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_nothing_leaks_over_a_ring(pool: ProcessPool, layout: str, topology: tuple[int, ...]) -> None:
    world = math.prod(topology)
    for said in pool.run(leak_job, world=world, topology=topology, layout=layout, names=NAMES):
        assert said == []
