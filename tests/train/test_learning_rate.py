"""Learning rates are those that transformers' own schedules give to an optimizer, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from mtraining.errors import UserError
from mtraining.train.config import TrainSection
from mtraining.train.schedule import check_schedule, learning_rate

STEPS, PEAK = 40, 3e-4
DECAYS = ("cosine", "linear", "1-sqrt")
# Options of a run, and how a script asks transformers for the same.
CURVES: dict[str, tuple[dict[str, Any], Any]] = {
    "cosine": (
        {"schedule": "cosine"},
        lambda optimizer, warmup: transformers.get_cosine_schedule_with_warmup(optimizer, warmup, STEPS),
    ),
    "linear": (
        {"schedule": "linear"},
        lambda optimizer, warmup: transformers.get_linear_schedule_with_warmup(optimizer, warmup, STEPS),
    ),
    "linear to a floor": (
        {"schedule": "linear", "min_lr": 1e-5},
        lambda optimizer, warmup: transformers.get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, STEPS, lr_end=1e-5, power=1.0
        ),
    ),
    "constant": (
        {"schedule": "constant"},
        lambda optimizer, warmup: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
    ),
    "cosine to a floor": (
        {"schedule": "cosine", "min_lr": 1e-5},
        lambda optimizer, warmup: transformers.get_scheduler(
            "cosine_with_min_lr", optimizer, warmup, STEPS, scheduler_specific_kwargs={"min_lr": 1e-5}
        ),
    ),
    **{
        f"wsd, {decay}": (
            {"schedule": "wsd", "decay_steps": 15, "decay": decay, "min_lr": 3e-5},
            lambda optimizer, warmup, decay=decay: transformers.get_wsd_schedule(
                optimizer, warmup, 15, STEPS, decay_type=decay, min_lr_ratio=0.1
            ),
        )
        for decay in DECAYS
    },
}


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("name", CURVES)
def test_every_step_has_the_rate_that_transformers_gives(name: str, warmup: int) -> None:
    given, make = CURVES[name]
    options = TrainSection(seq_len=16, steps=STEPS, lr=PEAK, warmup_steps=warmup, **given)
    check_schedule(options)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer, warmup)
    for step in range(STEPS):
        assert learning_rate(step, options) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step
        optimizer.step()
        scheduler.step()


def test_curves_by_hand() -> None:
    """Not only as transformers has them: peak, middle and end."""
    shape = {"seq_len": 16, "steps": 100, "lr": 1.0}

    def rate(step: int, **options: Any) -> float:
        return learning_rate(step, TrainSection(**shape, **options))

    cosine = {"warmup_steps": 20, "min_lr": 0.1}
    assert [rate(step, **cosine) for step in (0, 10, 20)] == [0.0, 0.5, 1.0]
    assert rate(60, **cosine) == pytest.approx(0.55)
    assert rate(100, **cosine) == pytest.approx(0.1)
    assert [rate(step, schedule="linear") for step in (0, 25, 75)] == [1.0, 0.75, 0.25]
    wsd = {"schedule": "wsd", "decay_steps": 50, "decay": "linear", "warmup_steps": 10}
    assert [rate(step, **wsd) for step in (5, 10, 50, 75)] == [0.5, 1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"warmup_steps": 10},
            "train.warmup_steps=10 leaves no step after the warm-up; use fewer than train.steps=10",
        ),
        ({"schedule": "wsd"}, "train.schedule=wsd needs train.decay_steps"),
        ({"decay_steps": 3}, "train.decay_steps=3 has no effect with train.schedule=cosine"),
        ({"decay": "linear"}, "train.decay=linear has no effect"),
        ({"schedule": "wsd", "decay_steps": 6, "warmup_steps": 5}, "are more than train.steps=10"),
        (
            {"schedule": "linear", "lr": 1e-5, "min_lr": 1e-5},
            "train.min_lr=1e-05 is not below train.lr=1e-05",
        ),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_schedule(TrainSection(**{"seq_len": 16, "steps": 10, **options}))
