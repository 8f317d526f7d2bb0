"""A prescribed vertical-slash index for benchmarks: random, of a given density, the same for every input.

Random weights attend to nothing in particular, so an estimated index would measure the estimate's caps. This
one has the shape that real heads have (a local window, isolated slashes, scattered columns), different for every
head, and as much of it as asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel import SparseIndex
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.vertical_slash import VerticalSlash


@dataclass(frozen=True)
class ToeplitzRandom(Pattern):
    """A window of block diagonals, isolated block diagonals and columns, drawn at random for each head.

    Attributes:
        density: share of the causal tiles that slash tiles take; columns come on top.
        window: nearest block diagonals, always selected.
        columns: columns a head, anywhere in the sequence.
        seed: of the draw; the same seed gives the same index on every rank and in every layer.
        with_estimation: also run the default estimation of ``vertical_slash`` and drop what it finds, so that a step
            costs what a real one would.
    """

    density: float = 0.05
    window: int = 8
    columns: int = 2048
    seed: int = 0
    with_estimation: bool = False

    name = "toeplitz_random"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "density", 0 < self.density <= 1, "use a share of the causal tiles such as 0.05")
        require(self, "window", self.window >= 1, "use at least 1, so that every token sees itself")
        require(self, "columns", self.columns >= 0, "use zero or more tokens")

    @torch.no_grad()
    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        if self.with_estimation:
            VerticalSlash(block_size=self.block_size).estimate(q, k, shard, scale)
        length = shard.covered(self.block_size)
        return _prescribed(self, q.shape[0], q.shape[2], length, q.device).extended(shard.seq_len)


@lru_cache(maxsize=8)
def _prescribed(
    pattern: ToeplitzRandom, batch: int, q_heads: int, seq_len: int, device: torch.device
) -> SparseIndex:
    """The index; made on the CPU, so that every device and rank gets the same one."""
    n = seq_len // pattern.block_size
    if pattern.columns > seq_len:
        raise UserError(
            f"pattern.columns: {pattern.columns} columns do not fit {seq_len} tokens; use fewer columns."
        )
    generator = torch.Generator().manual_seed(pattern.seed)
    rows = batch * q_heads
    diagonals = torch.stack([_diagonals(pattern, n, generator) for _ in range(rows)])
    columns = torch.stack([_columns(pattern.columns, seq_len, generator) for _ in range(rows)])
    return SparseIndex(
        seq_len,
        pattern.block_size,
        diagonals.unflatten(0, (batch, q_heads)).to(device),
        columns.unflatten(0, (batch, q_heads)).to(device),
    )


def _columns(count: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """``count`` different positions, ascending: int32 (count,)."""
    return torch.randperm(seq_len, generator=generator)[:count].sort().values.int()


def _diagonals(pattern: ToeplitzRandom, n: int, generator: torch.Generator) -> Tensor:
    """Bool (n,): the window, then random diagonals that touch no other one, then any, until the tiles are spent."""
    window = min(pattern.window, n)
    left = round(pattern.density * n * (n + 1) / 2) - sum(n - d for d in range(window))
    if left < 0:
        least = sum(n - d for d in range(window)) / (n * (n + 1) / 2)
        raise UserError(
            f"pattern.density: a window of {window} block diagonals is already {least:.4f} of {n} blocks; "
            f"use pattern.density >= {least:.4f}, or a smaller pattern.window."
        )
    chosen = [d < window for d in range(n)] + [False]
    order = torch.randperm(n, generator=generator).tolist()
    for isolated in (True, False):
        for d in order:
            touches = isolated and (chosen[d - 1] or chosen[d + 1])
            if n - d <= left and not chosen[d] and not touches:
                chosen[d] = True
                left -= n - d
    return torch.tensor(chosen[:n])
