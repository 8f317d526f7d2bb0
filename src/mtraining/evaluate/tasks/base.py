"""What an evaluation task is: a maker of samples and a score.

A task makes one sample from a size (how much haystack), a random generator and the sample's number. `fit.py` finds the
size that fills a token budget. The same seed, task, length and number give the same sample on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from mtraining.errors import UserError

Score = Callable[[str, Sequence[str]], float]
SHORT = 4096  # tokens under which some tasks take a smaller form


class Absent(UserError):
    """Data that a task needs was not given, and is not here."""


@dataclass(frozen=True)
class Draft:
    """One sample as text.

    Attributes:
        prompt: what a chat template would wrap: instruction, context and question.
        cue: the beginning of the answer. It follows the template, so that a base model completes it.
        references: the right answers; the task's score says how many of them are wanted.
        details: what a table or a heat map needs to know, such as ``depth``; JSON values.
    """

    prompt: str
    cue: str
    references: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: as in tables and in ``--tasks``.
        suite: ``needle``, ``ruler`` or ``infinitebench``.
        new_tokens: tokens that the model may answer with; with ``scales``, at a length of 128K tokens.
        score: (prediction, references) -> 0.0 to 1.0.
        draft: (size, generator, number) -> one sample. Larger sizes give longer prompts.
        least: the smallest size that makes sense.
        fixed: the context is a document from a file, whatever the size. A prompt over the budget loses its middle.
        samples: how many different samples there are; None where they are generated without end.
        scales: the answer grows with the prompt.
        short: what makes samples of fewer than 4,096 tokens, where that is something else.
    """

    name: str
    suite: str
    new_tokens: int
    score: Score
    draft: Callable[[int, Random, int], Draft]
    least: int = 1
    fixed: bool = False
    samples: int | None = None
    scales: bool = False
    short: Callable[[int, Random, int], Draft] | None = None

    def answer_tokens(self, length: int) -> int:
        """Tokens that the model may answer with when prompt and answer take ``length``."""
        return max(1, self.new_tokens * length // 131_072) if self.scales else self.new_tokens

    def make(self, size: int, rng: Random, number: int, length: int) -> Draft:
        """A sample of some size for a length."""
        return (self.short if self.short and length < SHORT else self.draft)(size, rng, number)


def generator(seed: int, task: str, length: int, number: int) -> Random:
    """The random numbers of one sample: the same whatever else was made before it."""
    return Random(f"{seed}/{task}/{length}/{number}")
