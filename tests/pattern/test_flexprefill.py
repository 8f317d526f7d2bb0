"""FlexPrefill against the paper's algorithms, by plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtraining.errors import UserError
from mtraining.pattern import SequenceShard, build_pattern
from mtraining.pattern import flexprefill as module
from mtraining.pattern.base import Alone
from mtraining.pattern.pooled import heaviest_pairs, jensen_shannon_distance

SIZE, N = 4, 32
BLOCKS = N // SIZE


def softmax(x: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in x)
    return [math.exp(v) / total for v in x]


def distance(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return math.sqrt(
        sum(a * math.log(a / m) for x in (p, q) for a, m in zip(x, middle, strict=True) if a > 0) / 2
    )


def fewest(mass: dict[Any, float], forced: set[Any], goal: float) -> set[Any]:
    """Forced ones, then the heaviest until the goal is reached."""
    chosen, total = set(forced), sum(mass[i] for i in forced)
    for i in sorted(set(mass) - forced, key=lambda i: -mass[i]):
        if total >= goal:
            break
        chosen.add(i)
        total += mass[i]
    return chosen


def brute_force(q: Tensor, k: Tensor, gamma: float, tau: float, scale: float) -> tuple[Tensor, list[bool]]:
    """(heads, n, n) of one sequence, and which heads are query-aware."""
    heads = q.shape[1]
    mask, aware = torch.zeros(heads, N, N, dtype=torch.bool), []
    for h in range(heads):
        keys = k[:, h * k.shape[1] // heads]
        mean_q, mean_k = q[:, h].unflatten(0, (-1, SIZE)).mean(1), keys.unflatten(0, (-1, SIZE)).mean(1)
        vertical = dict.fromkeys(range(N), 0.0)
        slash = dict.fromkeys(range(N), 0.0)
        for row in range(N - SIZE, N):
            for j, p in enumerate(softmax([float(q[row, h] @ keys[j]) * scale for j in range(row + 1)])):
                vertical[j] += p / SIZE
                slash[row - j] += p / SIZE
        pooled = [
            softmax([float(mean_q[i] @ mean_k[j]) * scale for j in range(i + 1)]) for i in range(BLOCKS)
        ]
        true = [sum(vertical[j] for j in range(b * SIZE, (b + 1) * SIZE)) for b in range(BLOCKS)]
        aware.append(distance(pooled[-1], true) < tau)
        if aware[-1]:
            pairs = {(i, j): p for i, row in enumerate(pooled) for j, p in enumerate(row)}
            chosen = fewest(pairs, set(), gamma * BLOCKS) | {(i, j) for i in range(BLOCKS) for j in (0, i)}
        else:
            columns = fewest(vertical, set(range(SIZE)), gamma)
            chosen = {
                (row // SIZE, (row - d) // SIZE)
                for d in fewest(slash, set(range(SIZE)), gamma)
                for row in range(d, N)
            }
            mask[h, :, list(columns)] = True
        for i, j in chosen:
            mask[h, i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE] = True
    return mask & torch.ones(N, N, dtype=torch.bool).tril(), aware


@settings(max_examples=25)
@given(st.integers(0, 2**20), st.sampled_from([0.3, 0.6, 0.9]), st.sampled_from([0.0, 0.25, 2.0]))
def test_equals_brute_force(seed: int, gamma: float, tau: float) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(1, N, 4, 8, dtype=torch.float64) * 2, torch.randn(1, N, 2, 8, dtype=torch.float64)
    pattern = build_pattern("flexprefill", block_size=SIZE, gamma=gamma, tau=tau)
    expected, aware = brute_force(q[0], k[0], gamma, tau, 0.35)
    index = pattern.estimate(q, k, SequenceShard.whole(N), 0.35)
    assert torch.equal(index.to_mask()[0], expected)
    assert index.diagonals.any(-1)[0].logical_not().tolist() == aware


def test_heads_may_be_taken_in_any_number_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, N, 8, 8, dtype=torch.float64) * 2, torch.randn(2, N, 4, 8, dtype=torch.float64)
    pattern = build_pattern("flexprefill", block_size=SIZE, gamma=0.5, tau=0.25)
    at_once = pattern.estimate(q, k, SequenceShard.whole(N), 0.35)
    sizes = []

    def counted(*args: Any) -> Tensor:
        sizes.append(args[0].shape[1])
        return heaviest_pairs(*args)

    monkeypatch.setattr(module, "heaviest_pairs", counted)
    monkeypatch.setattr(module, "_MAP", 2 * 6 * BLOCKS**2)  # three of four kv heads
    in_parts = pattern.estimate(q, k, SequenceShard.whole(N), 0.35)
    assert sizes == [6, 2]
    assert torch.equal(in_parts.to_mask(), at_once.to_mask())
    assert at_once.diagonals.any(-1).unique().tolist() == [False, True], "heads of both kinds"


def test_both_kinds_of_head_occur() -> None:
    """Else the case of tau = 0.25 above would show nothing that 0 and 2 do not."""
    torch.manual_seed(0)
    q, k = torch.randn(N, 16, 8, dtype=torch.float64) * 2, torch.randn(N, 16, 8, dtype=torch.float64)
    assert set(brute_force(q, k, 0.5, 0.25, 0.35)[1]) == {True, False}


@given(st.integers(0, 2**20), st.sampled_from([torch.float32, torch.float64]), st.floats(0.01, 0.999))
def test_the_cut_is_the_sorted_one(seed: int, dtype: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(2, 3, 5, 7, generator=generator, dtype=dtype) * 8).softmax(-1)
    chosen = heaviest_pairs(weights, share, 5.0, Alone())
    ranked = weights.flatten(2).double().sort(-1, descending=True).values
    for b in range(2):
        for h in range(3):
            mine = weights[b, h][chosen[b, h]].double()
            assert mine.sum() >= share * 5 - 1e-12
            assert mine.sum() - mine.min() < share * 5
            assert torch.equal(mine.sort(descending=True).values, ranked[b, h, : mine.numel()])


def test_equal_weights_are_chosen_together_and_zeros_only_when_all_is_asked() -> None:
    weights = torch.tensor([0.5, 0.25, 0.25, 0.0]).view(1, 1, 1, 4)
    assert heaviest_pairs(weights, 0.6, 1.0, Alone()).flatten().tolist() == [True, True, True, False]
    assert heaviest_pairs(weights, 1.0, 1.0, Alone()).all()
    one = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)  # the largest weight there is
    for dtype in (torch.float32, torch.float64):
        assert heaviest_pairs(one.to(dtype), 0.5, 1.0, Alone()).flatten().tolist() == [False, True]


def test_distance_of_distributions() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert jensen_shannon_distance(p, p) == 0
    assert jensen_shannon_distance(p, q).item() == pytest.approx(distance(p.tolist(), q.tolist()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0}, "pattern.gamma: 0"),
        ({"tau": -1}, "pattern.tau: -1"),
        ({"max_columns": 10}, "pattern.max_columns: 10 .* first block alone has 128"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_pattern("flexprefill", **options)
