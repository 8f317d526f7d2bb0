"""Partial attentions of the ranks merge to attention over all keys, ranks without any included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.kernel.reference.decode import decode_attention
from mtraining.ring import Ring, merge_over_ring

COUNTS = {2: ((7, 3), (5, 0)), 4: ((2, 0), (7, 0), (1, 0), (0, 0))}  # keys of each row, by rank


def tensors(world: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A query (2 rows, 4 heads), and each rank's keys and values."""
    made = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 8, generator=made, dtype=torch.float64)
    kv = [torch.randn(2, 2, 7, 2, 8, generator=made, dtype=torch.float64) for _ in range(world)]
    return q, [x[0] for x in kv], [x[1] for x in kv]


def merged(worker: Worker, nested: bool) -> Tensor:
    """Job: this rank's keys, and then everyone's."""
    mesh = worker.mesh((2, 2), ("cp_outer", "cp_inner")) if nested else worker.mesh()
    ring = Ring.over(mesh)
    q, k, v = tensors(worker.world)
    lengths = torch.tensor(COUNTS[worker.world][ring.rank], dtype=torch.int32)
    out, lse = decode_attention(q, k[ring.rank], v[ring.rank], lengths, 7, 0.5)
    return merge_over_ring(out, lse, ring)


@pytest.mark.parametrize(("world", "nested"), [(2, False), (4, False), (4, True)])
def test_ranks_merge_to_the_whole(pool: ProcessPool, world: int, nested: bool) -> None:
    q, k, v = tensors(world)
    first, *others = pool.run(merged, world=world, nested=nested)
    assert all(torch.equal(first, other) for other in others)
    for row in range(2):
        counts = [COUNTS[world][rank][row] for rank in range(world)]
        keys, values = (
            torch.cat([x[rank][row, :count] for rank, count in enumerate(counts)])[None] for x in (k, v)
        )
        if not sum(counts):
            assert not first[row].any()
            continue
        whole = torch.tensor([sum(counts)], dtype=torch.int32)
        expected, _ = decode_attention(q[row : row + 1], keys, values, whole, sum(counts), 0.5)
        torch.testing.assert_close(first[row], expected[0])


def test_one_process_has_the_whole_already() -> None:
    out, lse = torch.randn(1, 2, 4), torch.randn(1, 2)
    assert merge_over_ring(out, lse, Ring.over(None)) is out
