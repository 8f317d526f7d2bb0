"""Budgets that change over training: steps of dense attention, and a sparsity that grows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from mtraining.errors import UserError
from mtraining.pattern import MoBA, Pattern, PerHead, VerticalSlash


@dataclass(frozen=True)
class Anneal:
    """What steps compute in place of the pattern as it stands. Steps count from 1, as in the metrics.

    Attributes:
        dense_first: steps at the beginning that attend to everything.
        dense_every: every so many steps, one attends to everything; 0: none does.
        widen: how many times as large budgets are in the first step; 1 leaves them as they are.
        widen_steps: steps in which that factor falls to 1, by the same ratio at each.

    Raises:
        UserError: a negative number, or one of ``widen`` and ``widen_steps`` without the other.
    """

    dense_first: int = 0
    dense_every: int = 0
    widen: float = 1.0
    widen_steps: int = 0

    def __post_init__(self) -> None:
        for name, least in (("dense_first", 0), ("dense_every", 0), ("widen", 1), ("widen_steps", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise UserError(
                    f"pattern.anneal.{name}={getattr(self, name)}: use a number of at least {least}."
                )
        if (self.widen > 1) != (self.widen_steps > 0):
            raise UserError(
                f"pattern.anneal: widen={self.widen:g} and widen_steps={self.widen_steps} belong together; give both, "
                "such as widen: 4 and widen_steps: 200, or none."
            )

    @property
    def active(self) -> bool:
        """Whether any step differs from the pattern as it stands."""
        return bool(self.dense_first or self.dense_every or self.widen_steps)

    def dense(self, step: int) -> bool:
        """Whether step ``step`` attends to everything."""
        return step <= self.dense_first or (self.dense_every > 0 and step % self.dense_every == 0)

    def factor(self, step: int) -> float:
        """How many times as large budgets are in step ``step``: ``widen`` in the first, 1 after ``widen_steps``."""
        left = max(0.0, 1 - (step - 1) / self.widen_steps) if self.widen_steps else 0.0
        return self.widen**left

    def pattern(self, pattern: Pattern, step: int) -> Pattern:
        """``pattern`` with the budgets of step ``step``."""
        factor = self.factor(step)
        return pattern if factor == 1 else widened(pattern, factor)

    def check(self, pattern: Pattern) -> None:
        """Refuse a pattern whose budget cannot be widened.

        Raises:
            UserError: naming the pattern.
        """
        if self.widen_steps:
            widened(pattern, self.widen)


_TILE = 128  # columns that any kernel reads at a time are a divisor of it


def _times(factor: float, value: int) -> int:
    """A budget of whole tiles stays one: the kernels that were compiled for it serve every step, and read no mask."""
    if value % _TILE == 0:
        return math.ceil(factor * value / _TILE) * _TILE
    return round(factor * value)


def widened(pattern: Pattern, factor: float) -> Pattern:
    """``pattern`` with every budget ``factor`` times as large. The share of mass that is asked for stays.

    Raises:
        UserError: a pattern that has no number to multiply.
    """
    if isinstance(pattern, VerticalSlash):
        numbers: dict[str, Any] = {
            name: _times(factor, value)
            for name in ("top_k_columns", "top_k_slashes", "max_columns", "max_slashes")
            if (value := getattr(pattern, name)) is not None
        }
        return replace(pattern, **numbers, slash_density=min(1.0, factor * pattern.slash_density))
    if isinstance(pattern, MoBA):
        return replace(pattern, top_k=round(factor * pattern.top_k))
    if isinstance(pattern, PerHead):
        return replace(pattern, heads=tuple(widened(head, factor) for head in pattern.heads))
    if pattern.name == "dense":
        return pattern
    raise UserError(
        f"pattern.anneal.widen: {pattern.name} has no budget to widen; use it with vertical_slash or moba, or take "
        "pattern.anneal.dense_first or dense_every, which serve every pattern."
    )
