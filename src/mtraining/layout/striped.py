"""Block-striped layout: stripe b of ``unit`` tokens lives on rank b mod W as local stripe b // W.

A ring step then touches one residue class of block distances, the same on every rank: slash work is
balanced over ranks by construction, and over steps because neighbouring slashes fall into different classes.
arXiv 2510.18830, balanced sparse ring attention; docs/how/stripes.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.layout.base import Layout


@dataclass(frozen=True)
class Striped(Layout):
    name = "striped"

    def run_length(self, seq_len: int, world: int) -> int:
        return self.unit

    def owners(self, num_runs: int, world: int) -> Tensor:
        return torch.arange(num_runs) % world

    def multiple(self, world: int, block_size: int) -> int:
        if self.unit % block_size:
            raise UserError(
                f"layout.unit: a stripe of {self.unit} tokens cuts the pattern's blocks of {block_size}; "
                f"use a multiple of {block_size}, or pattern.block_size={self.unit}."
            )
        return world * self.unit
