"""The comparison of cheaper estimates: its forms, its reading of curves, and the table that the page shows of it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mtraining.kernel import SparseIndex
from mtraining.pattern import build_pattern

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "estimate-forms.csv"
PAGE = ROOT / "docs" / "performance" / "estimation.md"


@pytest.fixture
def bench(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("estimate_forms")


def test_recall_is_read_between_neighbouring_budgets(bench: ModuleType) -> None:
    points = [(0.3, 0.8, 0.6, 0.4), (0.1, 0.4, 0.2, 0.0)]
    assert bench.at_density(points, 0.15) == pytest.approx((0.5, 0.3, 0.1))
    assert bench.at_density(points, 0.05) is None and bench.at_density(points, 0.31) is None


def test_forms_that_the_patterns_have_are_the_patterns_choices(bench: ModuleType) -> None:
    """What is scored by hand here keeps what the pattern itself keeps."""
    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2048, heads, 16, generator=made) for heads in (2, 1))
    layer = bench.Layer(3 * q, k, 0.25)

    def chosen(index: SparseIndex) -> torch.Tensor:
        return torch.stack([tiles for *_, tiles in index.tiles_by_head()])

    shard = layer.shard
    paper = build_pattern("xattention", threshold=0.5).estimate(layer.q, layer.k, shard, 0.25)
    assert torch.equal(chosen(layer.by_row(bench.squares(layer, 16), 0.5)), chosen(paper))
    whole = build_pattern("flexprefill", gamma=0.5, tau=9.0).estimate(layer.q, layer.k, shard, 0.25)
    assert torch.equal(chosen(layer.by_map(bench.means(layer, 1), 0.5)), chosen(whole))
    every = build_pattern("xattention", threshold=0.5, refine=99).estimate(layer.q, layer.k, shard, 0.25)
    assert torch.equal(chosen(layer.by_row(bench.means(layer, 1), 0.5)), chosen(every))
    sampled = bench.sampled_rows(layer)
    assert sampled.shape == (2, 16, 16) and sampled.triu(1).eq(0).all()


def test_the_page_says_what_was_measured(bench: ModuleType) -> None:
    with open(RESULTS, encoding="utf-8", newline="") as file:
        every = list(csv.DictReader(file))
    rows = [row for row in every if row["text"] == "moby-dick.txt"]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
    table = [line for line in lines if len(line) == 8]
    forms = {row["form"] for row in rows}
    shown = {line[0] for line in table} & forms
    assert shown == forms
    for line in table:
        form = line[0]
        if form not in forms:
            continue
        products, _ = bench.work(form, 524288, 128)
        assert line[1] == (
            "-" if form == "window" else f"{products:,.3g}" if products < 1000 else f"{products:,.0f}"
        )
        for tokens, cells in (("8192", line[2:5]), ("16384", line[5:8])):
            points = [
                tuple(float(row[name]) for name in ("density", "recall", "worst_decile", "far_recall"))
                for row in rows
                if row["form"] == form and row["tokens"] == tokens
            ]
            ten, twenty = (bench.at_density(points, density) for density in (0.1, 0.2))
            assert cells[0] == (f"{ten[0]:.3f}" if ten else "-")
            assert cells[1:] == ([f"{twenty[0]:.3f}", f"{twenty[2]:.3f}"] if twenty else ["-", "-"])
    for line in (line for line in lines if len(line) == 4 and line[0].removesuffix(", the paper") in forms):
        form = line[0].removesuffix(", the paper")
        points = [
            tuple(float(row[name]) for name in ("density", "recall", "worst_decile", "far_recall"))
            for row in every
            if row["form"] == form and row["text"] == "code.txt"
        ]
        ten, twenty = (bench.at_density(points, density) for density in (0.1, 0.2))
        assert line[1] == f"{ten[0]:.3f}", form
        assert line[2:] == ([f"{twenty[0]:.3f}", f"{twenty[2]:.3f}"] if twenty else ["-", "-"]), form
