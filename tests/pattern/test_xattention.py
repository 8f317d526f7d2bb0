"""XAttention against the paper's definition, score by score."""

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
from mtraining.pattern import SequenceShard, build_pattern
from mtraining.pattern import xattention as module
from mtraining.pattern.blocks import products
from mtraining.ring import Ring


def brute_force_blocks(
    q: Tensor, k: Tensor, size: int, stride: int, threshold: float, scale: float
) -> Tensor:
    """(heads, blocks, blocks) of one sequence, from the full score matrix."""
    n, heads, _ = q.shape
    blocks, squares, per = n // size, n // stride, size // stride
    chosen = torch.zeros(heads, blocks, blocks, dtype=torch.bool)
    for h in range(heads):
        scores = q[:, h] @ k[:, h * k.shape[1] // heads].T * scale
        mass = [[0.0] * blocks for _ in range(blocks)]
        for i in range(squares):
            sums = [
                sum(float(scores[i * stride + stride - 1 - s, j * stride + s]) for s in range(stride))
                / stride
                for j in range(i + 1)
            ]
            total = sum(math.exp(x) for x in sums)
            for j, x in enumerate(sums):
                mass[i // per][j // per] += math.exp(x) / total
        for row in range(blocks):
            order = sorted({0, row}) + sorted(set(range(1, row)), key=lambda j: -mass[row][j])
            kept = 0.0
            for place, block in enumerate(order):
                if place >= len({0, row}) and kept >= threshold * sum(mass[row]):
                    break
                chosen[h, row, block] = True
                kept += mass[row][block]
    return chosen


@settings(max_examples=20)
@given(
    st.integers(0, 2**20),
    st.sampled_from([(4, 4), (8, 2), (8, 8), (4, 1)]),
    st.sampled_from([0.3, 0.7, 0.95]),
)
def test_equals_brute_force(seed: int, sizes: tuple[int, int], threshold: float) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(1, 48, 4, 8, dtype=torch.float64) * 2, torch.randn(1, 48, 2, 8, dtype=torch.float64)
    pattern = build_pattern("xattention", block_size=sizes[0], stride=sizes[1], threshold=threshold)
    tiles = [t for *_, t in pattern.estimate(q, k, SequenceShard.whole(48), 0.35).tiles_by_head()]
    assert torch.equal(torch.stack(tiles), brute_force_blocks(q[0], k[0], *sizes, threshold, 0.35))


def inputs(seq_len: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, seq_len, 4, 8, generator=generator, dtype=torch.float64) * 4
    return q, torch.randn(2, seq_len, 2, 8, generator=generator, dtype=torch.float64)


def test_scores_are_made_in_small_chunks_and_the_future_hardly_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k = inputs(256)
    at_once = module.antidiagonal_mass(q, k, SequenceShard.whole(256), 0.35, 8, 4)
    torch.testing.assert_close(at_once.sum(-1), torch.full((2, 4, 32), 2.0, dtype=torch.float64))
    sizes: list[int] = []

    def counted(left: Tensor, right: Tensor) -> Tensor:
        scores = products(left, right)
        sizes.append(scores.numel())
        return scores

    monkeypatch.setattr(module, "products", counted)
    monkeypatch.setattr(module, "_SCORES", 1024)  # two blocks of queries at 32 blocks of keys
    in_chunks = module.antidiagonal_mass(q, k, SequenceShard.whole(256), 0.35, 8, 4)
    torch.testing.assert_close(in_chunks, at_once, rtol=1e-12, atol=1e-15)
    assert max(sizes) == 1024
    assert sum(sizes) < 0.54 * 2 * 4 * 64**2, "half of all squares, and the rest of the last block"


def masses_of_ranks(worker: Worker, layout: str, key_blocks: int, scores: int) -> tuple[Tensor, Tensor, int]:
    """This rank's rows, the same of one process, and how many scores were made."""
    ring, dealt = Ring.over(worker.mesh()), build_layout(layout, 8)
    q, k = inputs(256)
    made = 0

    def counted(left: Tensor, right: Tensor) -> Tensor:
        nonlocal made
        made += left.shape[0] * left.shape[1] * right.shape[1]
        return products(left, right)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_KEY_BLOCKS", key_blocks), ("_SCORES", scores), ("products", counted)):
            patch.setattr(module, name, value)
        shard = SequenceShard(dealt.positions(256, ring.world), ring)
        mine = [dealt.shard(x, ring.rank, ring.world) for x in (q, k)]
        found = module.antidiagonal_mass(mine[0], mine[1], shard, 0.35, 8, 4)
    whole = module.antidiagonal_mass(q, k, SequenceShard.whole(256), 0.35, 8, 4)
    return found, whole[:, :, shard.all_blocks(8)[ring.rank]], made


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("world", [2, 4])
def test_keys_may_come_in_any_pieces(pool: ProcessPool, layout: str, world: int) -> None:
    made = []
    for key_blocks, scores in ((1000, 2**20), (2 * world, 600), (3 * world, 1)):
        given = {"layout": layout, "key_blocks": key_blocks, "scores": scores}
        results = pool.run(masses_of_ranks, world=world, **given)
        for found, expected, _ in results:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        made.append(sum(count for *_, count in results))
    assert made[1] < made[0], "rows that see nothing of a piece are not scored against it"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stride": 48}, "pattern.stride: 48 .* divisor of pattern.block_size=128"),
        ({"stride": 0}, "pattern.stride: 0"),
        ({"threshold": 0.0}, "pattern.threshold: 0.0"),
        ({"threshold": 1.1}, "pattern.threshold: 1.1"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_pattern("xattention", **options)
