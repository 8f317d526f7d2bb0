"""What an evaluation while training will take of a GPU's memory: what training has there anyway, and a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mtraining.pattern import Pattern
from mtraining.predict.memory import Prediction, Workload, standing
from mtraining.predict.reading import ReadingWork, predict_reading


def predict_evaluation(
    step: Workload, patterns: Sequence[Pattern], length: int, new_tokens: int = 0
) -> Prediction:
    """The peak of reading one sequence between two steps, on the rank that takes most.

    Parameters stay sharded as training has them, and the optimizer keeps its state; gradients are gone.

    Args:
        step: of the training.
        patterns: of the layers, as the sequence is read.
        length: tokens of the sequence.
        new_tokens: that answer it at most; 0 asks for the loss of every token instead.

    Raises:
        Unpredictable: the model's code reads numbers, as some that route tokens do.
        UserError: the layout's stripes cut a pattern's blocks.
    """
    reading = predict_reading(
        ReadingWork(
            step.hf_model,
            step.ring,
            [length],
            new_tokens,
            patterns,
            step.layout,
            step.compute,
            scored=new_tokens == 0,
            loss_chunk=step.loss_chunk,
        )
    )
    own = standing(step)
    # A prompt that is read outside of training has all parameters on each rank.
    others = {name: size for name, size in reading.components.items() if name != "parameters"}
    more = sum(own.values()) - reading.components["parameters"]
    return replace(
        reading,
        components=own | others,
        moments={name: total + more for name, total in reading.moments.items()},
        work=f"an evaluation of {length} tokens",
        remedies="more GPUs (parallel.cp), or shorter evaluate.lengths",
    )
