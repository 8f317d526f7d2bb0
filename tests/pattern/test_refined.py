"""Pooled attention on two levels against plain loops, and how its work grows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtraining.errors import UserError
from mtraining.pattern import SequenceShard, build_pattern
from mtraining.pattern import refined as module
from mtraining.pattern.blocks import key_means, products, query_means
from mtraining.pattern.refined import refined_maps, super_block
from starts_cases import of_documents, of_window

SIZE, GROUP = 4, 2


def softmax(x: dict[int, float]) -> dict[int, float]:
    total = sum(math.exp(v) for v in x.values())
    return {j: math.exp(v) / total for j, v in x.items()}


def brute_force(
    q: Tensor, k: Tensor, refine: int, scale: float, firsts: list[int], nearest: list[int]
) -> list[list[dict[int, float]]]:
    """Weights of the blocks that each row of each head looks at, of one sequence.

    Args:
        q, k: (tokens, heads, dim) and (tokens, kv_heads, dim).
        firsts, nearest: of each block of rows the first block of its document, and the first that it may attend.
    """
    blocks = q.shape[0] // SIZE
    width = super_block(blocks)
    mean_q, mean_k = (x.unflatten(0, (blocks, SIZE)).mean(1) for x in (q, k))
    found: list[list[dict[int, float]]] = [[] for _ in range(q.shape[1])]
    for row, first in enumerate(firsts):
        for kv in range(k.shape[1]):
            heads = range(kv * GROUP, (kv + 1) * GROUP)
            between = list(range(max(first // width + 1, nearest[row] // width), row // width))
            votes = dict.fromkeys(between, 0.0)
            for head in heads:
                coarse = {
                    s: float(mean_q[row, head] @ mean_k[s * width : (s + 1) * width, kv].mean(0)) * scale
                    for s in between
                }
                for s, p in softmax(coarse).items():
                    votes[s] += p
            ends = {first // width, row // width}
            best = ends | set(sorted(between, key=lambda s: -votes[s])[: refine - len(ends)])
            seen = [j for j in range(nearest[row], row + 1) if j // width in best]
            for head in heads:
                found[head].append(
                    softmax({j: float(mean_q[row, head] @ mean_k[j, kv]) * scale for j in seen})
                )
    return found


def inputs(seed: int, blocks: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    q = 3 * torch.randn(1, blocks * SIZE, 4, 8, dtype=torch.float64, generator=made)
    return q, 2 * torch.randn(1, blocks * SIZE, 2, 8, dtype=torch.float64, generator=made)


@settings(max_examples=15)
@given(st.integers(0, 2**20), st.sampled_from([(20, 3), (20, 4), (33, 3), (64, 5), (5, 9)]), st.booleans())
def test_equals_brute_force(seed: int, sizes: tuple[int, int], packed: bool) -> None:
    """Both patterns choose as their definitions have it, of the blocks that two levels of means leave."""
    blocks, refine = sizes
    q, k = inputs(seed, blocks)
    shard, firsts = SequenceShard.whole(blocks * SIZE), [0] * blocks
    if packed:
        begin = seed % (blocks - 1) + 1
        lengths = [begin * SIZE, (blocks - begin) * SIZE]
        shard = shard.of_batch(starts=of_documents(lengths))
        firsts = [0] * begin + [begin] * (blocks - begin)
    maps = brute_force(q[0], k[0], refine, 0.35, firsts, firsts)
    by_row = build_pattern("xattention", block_size=SIZE, stride=4, threshold=0.7, refine=refine)
    by_map = build_pattern("flexprefill", block_size=SIZE, gamma=0.7, tau=9.0, refine=refine)
    rows, pairs = ([t for *_, t in p.estimate(q, k, shard, 0.35).tiles_by_head()] for p in (by_row, by_map))
    for head, weights in enumerate(maps):
        for row, mass in enumerate(weights):
            kept = {firsts[row], row}
            for block in sorted(set(mass) - kept, key=lambda j: -mass[j]):
                if sum(mass[j] for j in kept) >= 0.7:
                    break
                kept.add(block)
            assert set(rows[head][row].nonzero().flatten().tolist()) == kept
        for first in set(firsts):
            mine = {(i, j): p for i, row in enumerate(weights) if firsts[i] == first for j, p in row.items()}
            total, chosen = 0.0, set()
            for pair in sorted(mine, key=lambda pair: -mine[pair]):
                if total >= 0.7 * firsts.count(first):
                    break
                chosen.add(pair)
                total += mine[pair]
            if SIZE * firsts.count(first) < blocks:  # too short for a query of the probe: computed whole
                chosen = {(i, j) for i in range(blocks) for j in range(first, i + 1) if firsts[i] == first}
            chosen |= {(i, j) for i in range(blocks) if firsts[i] == first for j in (first, i)}
            of_document = [(i, j) for i, j in pairs[head].nonzero().tolist() if firsts[i] == first]
            assert set(of_document) == chosen


@pytest.mark.parametrize("window", [1, 30, 100])
def test_a_window_hides_what_it_does_not_reach(window: int) -> None:
    blocks = 40
    q, k = inputs(3, blocks)
    starts = of_window(blocks * SIZE, window)
    pattern = build_pattern("xattention", block_size=SIZE, stride=4, threshold=0.8, refine=3)
    index = pattern.estimate(q, k, SequenceShard.whole(blocks * SIZE).of_batch(starts=starts), 0.35)
    nearest = [int(starts[0, row * SIZE]) // SIZE for row in range(blocks)]
    firsts = [int(starts[0, row * SIZE] == row * SIZE) * row for row in range(blocks)]
    maps = brute_force(q[0], k[0], 3, 0.35, firsts, nearest)
    for weights, (*_, tiles) in zip(maps, index.tiles_by_head(), strict=True):
        for row, mass in enumerate(weights):
            kept = {firsts[row], row} & set(mass)
            for block in sorted(set(mass) - kept, key=lambda j: -mass[j]):
                if sum(mass[j] for j in kept) >= 0.8:
                    break
                kept.add(block)
            assert set(tiles[row].nonzero().flatten().tolist()) == kept


def made_of(blocks: int, entries: int, patch: pytest.MonkeyPatch) -> tuple[list[Tensor], int, int]:
    """Weights by step, how many products of fine blocks were made, and most of them at one time."""
    q, k = inputs(1, blocks)
    shard, sizes = SequenceShard.whole(blocks * SIZE), []

    def counted(left: Tensor, right: Tensor) -> Tensor:
        sizes.append(right.numel())
        return products(left, right)

    patch.setattr(module, "products", counted)
    patch.setattr(module, "_ENTRIES", entries)
    keys = key_means(k, SIZE, shard)
    weights = [
        found.weights for _, found in refined_maps(query_means(q, SIZE, shard), keys, shard, 0.35, SIZE, 3)
    ]
    return weights, sum(sizes), max(sizes)


def test_work_grows_with_the_power_of_three_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (made_of(blocks, 2**26, monkeypatch)[1] for blocks in (64, 1024))
    assert large == 16**1.5 * small


def test_keys_are_gathered_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,), number, _ = made_of(64, 2**26, monkeypatch)
    parts, same, most = made_of(64, 5 * 3 * 8 * 8, monkeypatch)  # five rows of one kv head
    assert same == number and most == 5 * 3 * 8 * 8
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["xattention", "flexprefill"])
def test_too_few_super_blocks_are_refused(name: str) -> None:
    for wrong in (-1, 1, 2):
        with pytest.raises(
            UserError, match=f"pattern.refine: {wrong} does not fit {name}; use 0 for all pairs, or 3"
        ):
            build_pattern(name, refine=wrong)


def test_rows_of_padding_weigh_nothing() -> None:
    """Else they would have a part in the cut through flexprefill's map."""
    q, k = inputs(4, 20)
    shard = SequenceShard.whole(20 * SIZE, padding=6 * SIZE + 1)
    queries, keys = query_means(q, SIZE, shard), key_means(k, SIZE, shard)
    ((_, found),) = refined_maps(queries, keys, shard, 0.35, SIZE, 3)
    sums = torch.tensor([1.0] * 14 + [0.0] * 6, dtype=torch.float64)
    torch.testing.assert_close(found.weights.sum(-1), sums.expand(1, 4, 20), rtol=1e-12, atol=0)
