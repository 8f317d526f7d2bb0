"""The learning rate as a pure function of the step: nothing to save, nothing to drift at resume."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtraining.train.config import TrainSection


def learning_rate(step: int, options: TrainSection) -> float:
    """The learning rate of optimizer step `step` (0-based): linear warm-up, then cosine to `min_lr`, or constant.

    Warm-up reaches the peak at step `warmup_steps` and never starts at zero; the cosine would reach `min_lr` at step
    `steps`, one after the last, so that no step is wasted when it is zero.
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / (options.warmup_steps + 1)
    if options.schedule == "constant":
        return options.lr
    span = options.steps - options.warmup_steps
    progress = min(1.0, (step - options.warmup_steps) / span)
    return options.min_lr + 0.5 * (options.lr - options.min_lr) * (1.0 + math.cos(math.pi * progress))
