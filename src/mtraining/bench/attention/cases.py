"""What is measured: shapes, densities and lengths, in presets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel.starts import document_starts, window_starts
from mtraining.pattern import Dense, Pattern, ToeplitzRandom


@dataclass(frozen=True)
class Case:
    """One shape of attention under a prescribed index (``toeplitz_random``, or ``dense`` at full blocks).

    Attributes:
        blocks_per_row: slash tiles a row of blocks, mean over rows; None: every block.
        columns: columns a head, on top.
        estimate: also time the estimation of ``vertical_slash`` on the same tensors.
        documents: packed into the sequence, of random lengths, which attend to themselves only; 0 for one sequence
            without starts.
        window: tokens of a sliding window; None without one.
    """

    seq_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    blocks_per_row: float | None
    columns: int = 0
    estimate: bool = False
    block_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    documents: int = 0
    window: int | None = None

    def starts(self) -> Tensor | None:
        """The first key of each query, int32 (1, seq_len); None where every query sees all before it.

        Documents begin anywhere: tokens drawn at random, the same ones in every run.
        """
        starts = None
        if self.documents:
            drawn = torch.randperm(self.seq_len - 1, generator=torch.Generator().manual_seed(self.documents))
            starts = document_starts(drawn[: self.documents - 1] + 1, self.seq_len)
        if self.window is not None:
            within = window_starts(self.seq_len, self.window)
            starts = within if starts is None else torch.maximum(starts, within)
        return starts

    def pattern(self) -> Pattern:
        if self.blocks_per_row is None:
            return Dense(block_size=self.block_size)
        n = self.seq_len // self.block_size
        return ToeplitzRandom(
            block_size=self.block_size,
            density=min(1.0, 2 * self.blocks_per_row / (n + 1)),
            window=max(1, min(8, int(self.blocks_per_row // 2))),
            columns=self.columns,
        )

    def shortened(self, seq_len: int) -> Case:
        """The same heads and kind of index on at most ``seq_len`` tokens, thin enough to have gaps."""
        if seq_len >= self.seq_len:
            return self
        n = seq_len // self.block_size
        blocks = None if self.blocks_per_row is None else min(self.blocks_per_row, (n + 1) / 4)
        window = None if self.window is None else min(self.window, seq_len // 4)
        return replace(
            self,
            seq_len=seq_len,
            blocks_per_row=blocks,
            columns=min(self.columns, seq_len // 8),
            window=window,
        )

    def describe(self) -> str:
        blocks = "all" if self.blocks_per_row is None else f"{self.blocks_per_row:g}"
        return (
            f"{self.seq_len} tokens, {self.q_heads}/{self.kv_heads} heads of {self.head_dim}, "
            f"{blocks} blocks a row, {self.columns} columns{self._bounds()}"
        )

    def name(self) -> str:
        """The pattern, and what bounds it."""
        return self.pattern().name + self._bounds()

    def _bounds(self) -> str:
        documents = f", {self.documents} documents" if self.documents else ""
        return documents + (f", window {self.window}" if self.window is not None else "")


_K = 1024
_TARGETS = (
    Case(32 * _K, 32, 8, 128, 27),
    Case(32 * _K, 32, 8, 128, 7),
    Case(32 * _K, 32, 8, 128, None),
    Case(32 * _K, 32, 8, 128, 27, 4096),
    Case(32 * _K, 32, 8, 64, 27),
    Case(32 * _K, 9, 3, 64, 27),
    Case(128 * _K, 32, 8, 128, 26),
    Case(128 * _K, 32, 8, 128, 26, 4096, estimate=True),
    Case(512 * _K, 32, 8, 128, 26, 4096, estimate=True),
    Case(128 * _K, 16, 2, 128, 26, 2048),
    Case(512 * _K, 16, 2, 128, 103, 2048),
)
_GROWTH = tuple(Case(n * _K, 32, 8, 128, 26, 4096, estimate=True) for n in (32, 64, 128, 256, 512))
_DENSE = tuple(Case(n * _K, *heads, None) for n in (32, 128) for heads in ((32, 8, 128), (32, 8, 64)))
_TINY = (
    Case(256, 4, 2, 16, 4, 0, block_size=16, dtype=torch.float32),
    Case(256, 4, 2, 16, 4, 24, estimate=True, block_size=16, dtype=torch.float32),
)
PRESETS: dict[str, tuple[Case, ...]] = {
    "targets": _TARGETS,
    "quick": tuple(case for case in _TARGETS if case.seq_len <= 32 * _K),
    "growth": _GROWTH,
    "dense": _DENSE,
    "tiny": _TINY,
}


def preset(
    name: str, max_seq_len: int | None = None, documents: int = 0, window: int | None = None
) -> tuple[Case, ...]:
    """The cases of a preset up to ``max_seq_len`` tokens, with these documents and this window.

    Raises:
        UserError: unknown name, nothing left, or no documents or window of that size.
    """
    if name not in PRESETS:
        raise UserError(f"preset: {name!r} is not known; choose one of {', '.join(PRESETS)}.")
    cases = tuple(case for case in PRESETS[name] if max_seq_len is None or case.seq_len <= max_seq_len)
    if not cases:
        least = min(case.seq_len for case in PRESETS[name])
        raise UserError(f"max-seq-len: {max_seq_len} leaves nothing of preset {name}; use at least {least}.")
    if not 0 <= documents <= cases[0].seq_len:
        raise UserError(f"documents: {documents} cannot be packed; use 0 for none, or a few.")
    if window is not None and window < 1:
        raise UserError(f"window: {window} holds no token; use at least 1.")
    # Estimates are timed without: what they make of documents is their own matter.
    bounded = documents or window is not None
    return tuple(
        replace(case, documents=documents, window=window, estimate=case.estimate and not bounded)
        for case in cases
    )
