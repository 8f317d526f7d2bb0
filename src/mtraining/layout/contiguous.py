"""Contiguous layout: rank r holds the r-th equal part. Simple, and balances nothing under a causal mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.layout.base import Layout


@dataclass(frozen=True)
class Contiguous(Layout):
    name = "contiguous"

    def run_length(self, seq_len: int, world: int) -> int:
        return seq_len // world

    def owners(self, num_runs: int, world: int) -> Tensor:
        return torch.arange(world)

    def multiple(self, world: int, block_size: int) -> int:
        return world * block_size
