"""The page about one text stays small, whatever the model and the text."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from mtraining.evaluate.inspect import CELLS, SIDES, Inspection, Miss, map_side
from mtraining.report.attention import attention_page


def inspection(layers: int, heads: int, tokens: int) -> Inspection:
    """Numbers that take as many digits as there are."""
    torch.manual_seed(0)
    side = map_side(layers * heads, 128)
    distances = [0] + [2**power for power in range((tokens - 1).bit_length())]
    mass = torch.rand(layers, heads, len(distances), dtype=torch.float64)
    return Inspection(
        tokens=tokens,
        rows=torch.arange(128),
        recall=torch.rand(layers, heads, dtype=torch.float64),
        density=torch.rand(layers, heads, dtype=torch.float64),
        distances=distances,
        mass=mass,
        kept=mass * 0.987654321,
        maps=torch.rand(layers, heads, side, side) / 30,
        chosen=torch.rand(layers, heads, side, side),
        misses=[
            Miss(layer, head, tokens - 1, n, 0.1 * n)
            for layer in range(layers)
            for head in range(heads)
            for n in range(5)
        ],
    )


def maps_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return next(chart for chart in json.loads(found.group(1))["charts"] if chart["name"] == "map")


@pytest.mark.parametrize(
    ("layers", "heads", "tokens", "every_map"),
    [(2, 4, 4096, True), (36, 16, 2**19, True), (80, 64, 2**20, True), (126, 128, 2**20, False)],
)
def test_a_page_is_below_five_megabytes(layers: int, heads: int, tokens: int, every_map: bool) -> None:
    """From a small model to one of 405B parameters, up to a million tokens."""
    found = inspection(layers, heads, tokens)
    page = attention_page(found, list(range(tokens)), lambda ids: "long word " * len(ids), "m", "t", "sparse")
    assert 1_000_000 < len(page.encode()) < 5_000_000
    maps = maps_of(page)
    assert (len(maps["tables"]) == layers * heads) == every_map
    assert bool(maps["missing"]) != every_map
    # The worst heads are there first.
    worst = found.recall.flatten().argsort()[0].item()
    assert next(iter(maps["tables"])).startswith(f"layer {worst // heads}, head {worst % heads}:")


def test_a_map_s_side_follows_the_number_of_heads() -> None:
    assert map_side(8, 128) == SIDES[1] and map_side(8, 16) == 16
    for heads in (100, 576, 2000):
        assert map_side(heads, 128) ** 2 / 2 * heads <= CELLS
    assert map_side(100_000, 128) == SIDES[0]
