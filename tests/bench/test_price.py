"""The price of columns beside tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtraining.bench import price as module
from mtraining.bench.timing import Timing


def test_price_of_a_column_is_its_time_over_its_area(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of tiles forward and backward, then of columns, are each divided by the area that took them."""
    times, ran = iter([1.0, 2.0, 3.0, 6.0]), []

    def measured(run: Any, device: torch.device) -> Timing:
        ran.append(run())
        return Timing(next(times), None)

    shares = torch.tensor([[0.3, 0.1]]), torch.tensor([[0.1, 0.1]])
    monkeypatch.setattr(module, "measure", measured)
    monkeypatch.setattr(module, "densities", lambda index: shares)
    price = module.column_price((4, 2, 16), 512, 32, torch.empty(0))
    assert price == pytest.approx((9 / 0.2) / (3 / 0.4))
    (tiles, _), (dk, _), (columns, _), grads = ran
    assert tiles.shape == columns.shape == (1, 512, 4, 16) and not torch.equal(tiles, columns)
    assert dk.shape == (1, 512, 2, 16) and grads.shape == (2, 1, 64, 4, 16)
