"""Vertical-slash against a brute-force definition written from the paper, entry by entry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.pattern import SequenceShard, VerticalSlash, build_pattern
from mtraining.pattern.diagonals import distances_to_diagonals
from mtraining.ring import Ring


def brute_force_mask(q: Tensor, k: Tensor, p: VerticalSlash) -> Tensor:
    """(heads, n, n) boolean mask of one sequence, by plain loops over METHOD.md section 1."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    masks = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        vertical, slash = [0.0] * n, [0.0] * n
        for row in range(max(0, n - p.probe), n):
            weights = [math.exp(float(q[row, h] @ k[c, h // group]) / math.sqrt(dim)) for c in range(row + 1)]
            for c, w in enumerate(weights):
                vertical[c] += w / sum(weights)
                slash[row - c] += w / sum(weights)
        columns = keep(vertical, p.sinks, p.top_p, p.top_k_columns or p.max_columns)
        distances = keep(slash, p.window, p.top_p, p.top_k_slashes or p.max_slashes)
        blocks = set()
        for d in distances:  # every block that a token at this distance can fall into
            blocks |= {i // p.block_size - (i - d) // p.block_size for i in range(d, d + p.block_size)}
        for i in range(n):
            for j in range(i + 1):
                masks[h, i, j] = j in columns or (i // p.block_size - j // p.block_size) in blocks
    return masks


def keep(mass: list[float], forced: int, top_p: float | None, limit: int) -> set[int]:
    order = list(range(min(forced, len(mass)))) + sorted(
        range(forced, len(mass)), key=lambda i: (-mass[i], i)
    )
    chosen: set[int] = set()
    total = 0.0
    for i in order[:limit]:
        if top_p is not None and i >= forced and total >= top_p * sum(mass):
            break
        chosen.add(i)
        total += mass[i]
    return chosen


@settings(max_examples=30)
@given(st.integers(0, 2**20), st.sampled_from([4, 8]), st.sampled_from([None, 0.4, 0.9]), st.integers(1, 40))
def test_equals_brute_force(seed: int, block_size: int, top_p: float | None, probe: int) -> None:
    torch.manual_seed(seed)
    n = 32
    q, k = torch.randn(1, n, 4, 16, dtype=torch.float64) * 2, torch.randn(1, n, 2, 16, dtype=torch.float64)
    limits = (
        {"top_k_columns": 7, "top_k_slashes": 6} if top_p is None else {"max_columns": 9, "max_slashes": 8}
    )
    pattern = VerticalSlash(block_size=block_size, top_p=top_p, probe=probe, sinks=2, window=3, **limits)
    index = pattern.estimate(q, k, SequenceShard.whole(n), 1 / math.sqrt(16))
    assert torch.equal(index.to_mask()[0], brute_force_mask(q[0], k[0], pattern))


def estimate_job(worker: Worker, layout: str, topology: tuple[int, ...], heads: int) -> Any:
    mesh = worker.mesh() if len(topology) == 1 else worker.mesh(topology, ("cp_outer", "cp_inner"))
    torch.manual_seed(5)
    q, k = (
        torch.randn(2, 128, heads, 16, dtype=torch.float64) * 2,
        torch.randn(2, 128, 1, 16, dtype=torch.float64),
    )
    ring, dealt = Ring.over(mesh), build_layout(layout, 8)
    shard = SequenceShard(dealt.positions(128, ring.world), ring)
    pattern = VerticalSlash(
        block_size=8, top_p=0.7, max_columns=20, max_slashes=15, probe=40, sinks=2, window=3
    )
    mine = [dealt.shard(x, ring.rank, ring.world) for x in (q, k)]
    alone = pattern.estimate(q, k, SequenceShard.whole(128), 0.25)
    return pattern.estimate(mine[0], mine[1], shard, 0.25), alone


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("topology", [(2,), (4,), (2, 2), (2, 4)], ids=str)
def test_distributed_estimate_equals_single_process(
    pool: ProcessPool, layout: str, topology: tuple[int, ...]
) -> None:
    """Five heads over 2, 4 or 8 ranks: some ranks own padding rows only, and a probe of 40 has several owners."""
    for ours, alone in pool.run(
        estimate_job, world=math.prod(topology), layout=layout, topology=topology, heads=5
    ):
        assert torch.equal(ours.diagonals, alone.diagonals)
        assert torch.equal(ours.columns, alone.columns)


@given(st.integers(1, 9), st.lists(st.integers(0, 71), max_size=8))
def test_distances_cross_two_diagonals(block_size: int, distances: list[int]) -> None:
    n = 8 * block_size
    padded = torch.tensor([[d if d < n else n for d in distances]], dtype=torch.int64).view(1, -1)
    bits = distances_to_diagonals(padded, n, block_size)[0]
    expected = {i // block_size - (i - d) // block_size for d in distances for i in range(d, n) if d < n}
    assert set(bits.nonzero().flatten().tolist()) == expected


def test_index_is_linear_in_length() -> None:
    pattern = VerticalSlash(max_columns=64, max_slashes=128)
    sizes = []
    for n in (2048, 4096):
        q, k = torch.randn(1, n, 2, 16), torch.randn(1, n, 1, 16)
        sizes.append(pattern.estimate(q, k, SequenceShard.whole(n), 0.25).nbytes())
    assert (
        sizes[1] - sizes[0] == 2 * 2048 // 128
    )  # one bit-flag a block and head; columns have a fixed budget


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_p": 1.5}, "pattern.top_p: 1.5"),
        ({"top_p": None}, "pattern.top_k_columns: None"),
        ({"top_k_slashes": 5}, "needs pattern.top_p set to null"),
        ({"sinks": 40, "max_columns": 30}, "pattern.sinks: 40 .* column budget of 30"),
        ({"window": 0}, "pattern.window: 0"),
        ({"probe": 0}, "pattern.probe: 0"),
        ({"block_size": 0}, "pattern.block_size: 0"),
        ({"max_colums": 3}, "no such option .did you mean 'max_columns'"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_pattern("vertical_slash", **options)


def test_unknown_pattern_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'vertical_slash'"):
        build_pattern("vertical-slash")
