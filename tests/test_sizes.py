"""Sizes are told in a unit in which they are not 0.00, and lengths in whole K and M."""

from __future__ import annotations

import pytest

from mtraining.bench.train.record import TrainRow, table
from mtraining.predict.memory import Prediction
from mtraining.sizes import size_text, tokens_text
from mtraining.train.memory_report import render, render_measured


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (3.5 * 2**20, "3.50 MiB"),
        (2**30 - 2**20, "1023.0 MiB"),
        (79.25 * 2**30, "79.2 GiB"),
        (5000 * 2**30, "5000.0 GiB"),
    ],
)
def test_the_unit_fits(size: float, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "1"),
        (1000, "1000"),
        (1024, "1K"),
        (1536, "1536"),
        (2**19, "512K"),
        (2**20, "1M"),
        (3 * 2**19, "1536K"),
    ],
)
def test_lengths(count: int, text: str) -> None:
    assert tokens_text(count) == text


def test_a_small_models_prediction_has_no_zeros() -> None:
    parts = {"parameters (shard)": 3 * 2**20, "loss": 700.0}
    made = Prediction("in the loss", parts, {"in the loss": 3 * 2**20 + 700.0}, 2048.0)
    assert render(made) == (
        "memory a GPU, predicted: 3.00 MiB in the loss (parameters (shard) 3.00 MiB, loss 700 bytes)"
    )
    assert render_measured(made, 5 * 2**20) == (
        "memory a GPU, measured: 5.00 MiB, 1.67 of what was predicted"
    )
    assert [size_text(size) for _, size in made.table()] == [
        "3.00 MiB",
        "700 bytes",
        "3.00 MiB",
        "2.00 KiB",
        "92.2 KiB",
        "2.50 GiB",
        "2.50 GiB",
    ]


def test_the_bench_table_too() -> None:
    row = TrainRow(
        "", "", "", 1, "", "tiny", 2, 256, 1.0, "dense", "striped", "flat", "none", "", "auto", "none", False, "off",
        "full", 3, 1.0, 256.0, None, None, 0.001, 0.0005, None, None, None, None, "",
    )  # fmt: skip
    heads, cells = table([row])
    shown = dict(zip(heads, cells[0], strict=True))
    assert shown["peak memory"] == "1.02 MiB" and shown["predicted"] == "524.3 KiB"
