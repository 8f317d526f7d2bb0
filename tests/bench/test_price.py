"""The price of columns beside tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtraining.bench.attention import price as module
from mtraining.bench.timing import Timing
from mtraining.kernel import SparseIndex


def test_price_of_a_column_is_its_time_over_its_area(monkeypatch: pytest.MonkeyPatch) -> None:
    """What columns add to the time of tiles alone, over the area that they add."""
    times, ran = iter([1.0, 2.0, 4.0, 8.0]), []

    def measured(run: Any, device: torch.device) -> Timing:
        ran.append(run())
        return Timing(next(times), None)

    shares = iter([torch.tensor([[0.3, 0.1]]), torch.tensor([[0.4, 0.2]])])
    monkeypatch.setattr(module, "measure", measured)
    monkeypatch.setattr(SparseIndex, "cost", lambda index: next(shares))
    price = module.column_price((4, 2, 16), 512, 32, torch.empty(0))
    assert price == pytest.approx((9 / 0.2) / (3 / 0.4))
    (out, _), _, (more, _), (dq, dk, _) = ran
    assert out.shape == more.shape == dq.shape == (1, 512, 4, 16) and not torch.equal(out, more)
    assert dk.shape == (1, 512, 2, 16)
