"""The learning rate as a pure function of the step: nothing to save, nothing to drift at resume.

The curves are transformers' own (`transformers.optimization`), so a recipe keeps its curve when it moves here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from mtraining.errors import UserError

if TYPE_CHECKING:
    from mtraining.train.config import TrainSection


def learning_rate(step: int, options: TrainSection) -> float:
    """The learning rate of optimizer step `step` (0-based).

    The warm-up rises linearly from zero, as in transformers: the first of its steps updates nothing. It reaches the
    peak at step `warmup_steps`. What falls would reach `min_lr` at step `steps`, one after the last.
    """
    curve = _curve(
        options.schedule,
        options.lr,
        options.min_lr,
        options.warmup_steps,
        options.steps,
        options.decay_steps or 0,
        options.decay,
    )
    return options.lr * curve(step)


def check_schedule(options: TrainSection) -> None:
    """Refuse a curve that cannot be drawn.

    Raises:
        UserError: phases that are longer than the run, or an option that the schedule does not read.
    """
    steps, warmup, decay = options.steps, options.warmup_steps, options.decay_steps
    if warmup >= steps:
        raise UserError(
            f"train.warmup_steps={warmup} leaves no step after the warm-up; use fewer than train.steps={steps}."
        )
    if options.schedule != "constant" and options.min_lr >= options.lr:
        raise UserError(
            f"train.min_lr={options.min_lr:g} is not below train.lr={options.lr:g}; lower it, or use "
            "train.schedule=constant."
        )
    for name, value, default in (("decay_steps", decay, None), ("decay", options.decay, "cosine")):
        if options.schedule != "wsd" and value != default:
            raise UserError(
                f"train.{name}={value} has no effect with train.schedule={options.schedule}; remove it, or use "
                "train.schedule=wsd."
            )
    if options.schedule == "wsd" and decay is None:
        raise UserError(
            f"train.schedule=wsd needs train.decay_steps, the length of its last phase; a tenth of the run is usual: "
            f"{max(1, steps // 10)}."
        )
    if decay is not None and warmup + decay > steps:
        raise UserError(
            f"train.warmup_steps={warmup} and train.decay_steps={decay} are more than train.steps={steps}; use fewer."
        )


@functools.lru_cache(maxsize=16)
def _curve(
    schedule: str, lr: float, min_lr: float, warmup: int, steps: int, decay_steps: int, decay: str
) -> Callable[[int], float]:
    """What `lr` is multiplied with at each step."""
    # transformers makes schedules of optimizers alone, and reads no more of one than its rate.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    if schedule == "constant":
        made = get_constant_schedule_with_warmup(optimizer, warmup)
    elif schedule == "cosine":
        made = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr=min_lr)
    elif schedule == "wsd":
        made = get_wsd_schedule(
            optimizer, warmup, decay_steps, steps, decay_type=decay, min_lr_ratio=min_lr / lr
        )
    elif min_lr > 0:
        made = get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=min_lr)
    else:
        made = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    curve: Callable[[int], float] = made.lr_lambdas[0]
    return curve
