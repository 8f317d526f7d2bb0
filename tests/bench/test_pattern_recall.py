"""The recall benchmark: what is read off its points, and that every pattern in it is measured as it is defined."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from mtraining.evaluate.recall import attention_rows
from mtraining.pattern import SequenceShard

TOKENS, SIZE = 512, 32


@pytest.fixture
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("pattern_recall_all")


def test_frontier_mixes_the_best_budgets_and_extrapolates_nothing(bench: ModuleType) -> None:
    points = [(0.3, 0.9, 0.7), (0.1, 0.5, 0.3), (0.2, 0.6, 0.4), (0.4, 0.8, 0.6)]
    assert bench.frontier(points, 0.2) == pytest.approx(
        (0.7, 0.5)
    )  # above the point at 0.2, which is not on the hull
    assert bench.frontier(points, 0.05) is None
    assert bench.frontier(points, 0.35) is None


def test_every_budget_is_measured_against_the_exact_mask(bench: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, TOKENS, 2, 16, generator=generator) * 2
    k = torch.randn(1, TOKENS, 1, 16, generator=generator)
    rows = torch.arange(5, TOKENS - 128, 31)
    measured = bench.Measured(rows, (SIZE,))
    measured.layer(q, k, 0.25)
    points = measured.points()
    assert {curve for curve, _ in points} == {(label, SIZE) for label in bench.sweep(SIZE)}
    assert all(milliseconds > 0 for times in measured.times.values() for milliseconds in times)

    truth = torch.stack([attention_rows(q, k, rows, head, 0.25) for head in range(2)])
    for (curve, pattern), (density, recall, worst) in points.items():
        index = pattern.estimate(q, k, SequenceShard.whole(TOKENS), 0.25)
        kept = (truth * index.to_mask()[0][:, rows]).sum(-1).mean(1)
        assert recall == pytest.approx(kept.mean().item(), abs=1e-5), curve
        assert worst == pytest.approx(kept.min().item(), abs=1e-5), curve
        assert density == pytest.approx(index.cost().mean().item()), curve


def test_a_description_names_what_a_budget_is(bench: ModuleType) -> None:
    narrow, *_ = bench.sweep(128)["moba + 32 sinks (union)"]
    assert bench.described(narrow) == "moba(chunk=128 top_k=1) a_shape(sinks=32 window=1)"
    assert all(
        len({bench.described(pattern) for pattern in patterns}) == len(patterns)
        for patterns in bench.sweep(64).values()
    )
