"""Samples that fill a budget of tokens: prompt and answer together take the length, or a little less.

RULER (arXiv 2404.06654) grows the haystack in fixed steps and tokenises each try. Here a few tries along the slope of
earlier ones find the size. All samples of a task and length begin at the size of the first one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtraining.errors import UserError
from mtraining.evaluate.tasks.base import Draft, Task, generator

_CLOSE = 0.002  # a haystack is large enough when this share of the budget, or less, is left
_TRIES = 24
_KEPT = 4_000_000  # tokens of samples that are kept for the next attention, about 150 MB
TEMPLATES = ("base", "chat")


@dataclass(frozen=True)
class Sample:
    """One prompt, ready for a model.

    Attributes:
        ids: the prompt's tokens, the beginning of the answer included.
        new_tokens: tokens that the model may add.
        removed: tokens taken out of the middle so that the prompt fits; 0 for generated tasks.
        draft: the text it was made of.
    """

    task: Task
    length: int
    number: int
    ids: list[int]
    new_tokens: int
    removed: int
    draft: Draft


class SampleMaker:
    """Makes samples for one tokenizer and template.

    Args:
        tokenizer: a transformers tokenizer.
        template: ``base`` (the prompt as it is) or ``chat`` (in the tokenizer's chat template).
        seed: of everything that is drawn.

    Raises:
        UserError: a template that is not known, or one that the tokenizer has not.
    """

    def __init__(self, tokenizer: Any, template: str = "base", seed: int = 42) -> None:
        if template not in TEMPLATES:
            raise UserError(f"--template {template!r} is not known; choose one of {', '.join(TEMPLATES)}.")
        if template == "chat" and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "--template chat: this tokenizer has no chat template; use --template base, or a tokenizer with one."
            )
        self.tokenizer = tokenizer
        self.template = template
        self.seed = seed
        self._sizes: dict[tuple[str, int], int] = {}
        self._made: dict[tuple[str, int, int], Sample] = {}
        self._room = _KEPT

    def check(self, task: Task, length: int) -> None:
        """Say beforehand that a task does not fit.

        Raises:
            UserError: its smallest sample and its answer are longer than ``length``.
        """
        budget = length - task.answer_tokens(length)
        if budget < 1 or (
            not task.fixed and len(self.encode(self._draft(task, length, 0, task.least))) > budget
        ):
            raise self._too_short(task, length)

    def make(self, task: Task, length: int, number: int) -> Sample:
        """Sample ``number`` of a task, for ``length`` tokens of prompt and answer together.

        The first samples are kept, since several attentions are asked the same.

        Raises:
            UserError: the smallest sample of the task is longer than that, or a sample that does not exist.
        """
        key = (task.name, length, number)
        if key in self._made:
            return self._made[key]
        sample = self._fresh(task, length, number)
        if len(sample.ids) <= self._room:
            self._room -= len(sample.ids)
            self._made[key] = sample
        return sample

    def _fresh(self, task: Task, length: int, number: int) -> Sample:
        if task.samples is not None and number >= task.samples:
            raise UserError(f"--samples: {task.name} has {task.samples} samples; ask for no more.")
        new_tokens = task.answer_tokens(length)
        budget = length - new_tokens
        if budget < 1:
            raise self._too_short(task, length)
        if task.fixed:
            draft = self._draft(task, length, number, 0)
            ids, removed = cut_middle(self.encode(draft), budget)
        else:
            draft, ids = self._filled(task, length, number, budget)
            removed = 0
        return Sample(task, length, number, ids, new_tokens, removed, draft)

    def encode(self, draft: Draft) -> list[int]:
        """The tokens of a prompt and the beginning of its answer, without an end-of-text token."""
        if self.template == "chat":
            messages = [{"role": "user", "content": draft.prompt}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(
                self.tokenizer(text + draft.cue.lstrip(), add_special_tokens=False, verbose=False).input_ids
            )
        ids = list(self.tokenizer(draft.prompt + draft.cue, verbose=False).input_ids)
        end = self.tokenizer.eos_token_id
        return ids[:-1] if ids and ids[-1] == end else ids

    def _draft(self, task: Task, length: int, number: int, size: int) -> Draft:
        return task.make(size, generator(self.seed, task.name, length, number), number, length)

    def _too_short(self, task: Task, length: int) -> UserError:
        answer = task.answer_tokens(length)
        return UserError(
            f"--lengths: task {task.name} and its answer of {answer} tokens do not fit into {length}; use a longer "
            f"length, or leave the task out of --tasks."
        )

    def _filled(self, task: Task, length: int, number: int, budget: int) -> tuple[Draft, list[int]]:
        """The largest sample found that fits the budget.

        Tokens grow nearly in proportion to the size. Each try goes where the line through the nearest known points
        meets the budget. It stays between the largest size that fits (``low``) and the smallest that does not.
        """
        # Every sample begins where the first one ends, so that it does not depend on what was made before it.
        if number != 0 and (task.name, length) not in self._sizes:
            self._filled(task, length, 0, budget)
        size = self._sizes.get((task.name, length), task.least) if number != 0 else task.least
        used: dict[int, int] = {}
        low, high = None, None
        best: tuple[Draft, list[int]] | None = None
        for _ in range(_TRIES):
            draft = self._draft(task, length, number, size)
            ids = self.encode(draft)
            used[size] = len(ids)
            if len(ids) <= budget:
                low, best = size, (draft, ids)
            else:
                high = size
            slope = _slope(used)
            if low is not None and budget - used[low] <= max(_CLOSE * budget, slope):
                break
            if (high is not None and high <= task.least) or (low is not None and high == low + 1):
                break
            # A little under the line: the next sample of this task may take a few tokens more.
            aim = size + (budget * (1 - _CLOSE / 4) - used[size]) / slope
            size = _between(int(aim), low, high, task.least, size)
        if best is None or low is None:
            raise self._too_short(task, length)
        if number == 0:
            self._sizes[task.name, length] = low
        return best


def _slope(used: dict[int, int]) -> float:
    """Tokens a unit of size adds, from the two largest sizes that were tried; from one, its average."""
    sizes = sorted(used)[-2:]
    if len(sizes) == 1:
        return used[sizes[0]] / max(sizes[0], 1)
    return max((used[sizes[1]] - used[sizes[0]]) / (sizes[1] - sizes[0]), 1e-6)


def _between(size: int, low: int | None, high: int | None, least: int, last: int) -> int:
    """``size``, kept between what fits and what does not, and to at most eight times the last one."""
    floor = least if low is None else low + 1
    ceiling = 8 * last if high is None else high - 1
    return max(floor, min(size, ceiling))


def cut_middle(ids: list[int], budget: int) -> tuple[list[int], int]:
    """The first and the last half of a budget, and how many tokens between them went (InfiniteBench's rule)."""
    if len(ids) <= budget:
        return ids, 0
    head = budget // 2
    return ids[:head] + ids[len(ids) - (budget - head) :], len(ids) - budget
