"""When kernels may walk one list of shifts for all rows: both block tables are progressions of one stride."""

from __future__ import annotations

import pytest
import torch

from mtraining.kernel.placement import progression


@pytest.mark.parametrize(
    ("q_blocks", "k_blocks", "step"),
    [
        ([1, 3, 5], [0, 2, 4], (2, 1)),
        ([0, 2, 4], [1, 3, 5], (2, -1)),
        ([4, 5], [0, 1], (1, 4)),
        ([3], [5], (1, -2)),
        ([0, 7], [1, 6], None),
        ([0, 3, 4], [0, 3, 4], None),
    ],
)
def test_progression(q_blocks: list[int], k_blocks: list[int], step: tuple[int, int] | None) -> None:
    q, k = torch.tensor(q_blocks), torch.tensor(k_blocks)
    assert progression(q, k) == step
    if step is not None:
        i, j = torch.arange(len(q)), torch.arange(len(k))
        assert torch.equal(q[:, None] - k[None, :], step[0] * (i[:, None] - j[None, :]) + step[1])
