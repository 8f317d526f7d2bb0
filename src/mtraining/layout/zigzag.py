"""Zigzag layout: 2W chunks, rank r holds chunks r and 2W-1-r. Balances dense causal work, but not slashes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.layout.base import Layout


@dataclass(frozen=True)
class Zigzag(Layout):
    name = "zigzag"

    def run_length(self, seq_len: int, world: int) -> int:
        return seq_len // (2 * world)

    def owners(self, num_runs: int, world: int) -> Tensor:
        chunk = torch.arange(2 * world)
        return torch.minimum(chunk, 2 * world - 1 - chunk)

    def multiple(self, world: int, block_size: int) -> int:
        return 2 * world * block_size
