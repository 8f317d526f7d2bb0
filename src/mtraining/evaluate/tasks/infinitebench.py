"""InfiniteBench (arXiv 2402.13718): six generated tasks, and six that ask about documents from its files.

Generated samples are made to the length that is asked, where the published ones stand at about 128K tokens. Prompts end
with the beginning of the answer, as the published ones for base models do. They are in our own words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from mtraining.errors import UserError
from mtraining.evaluate.tasks import metrics, published
from mtraining.evaluate.tasks.base import Absent, Draft, Score, Task
from mtraining.evaluate.tasks.haystack import NOISE, with_needles
from mtraining.evaluate.tasks.words import magic

DEPTHS = 59  # places of the passkey in the published samples
_QUESTIONS = (
    "largest",
    "second largest",
    "third largest",
    "smallest",
    "second smallest",
    "third smallest",
    "median",
)
_LETTERS = "ABCDEFGHIJ"
_LAYERS = (2, 4, 6, 8, 10)  # depth of calls in code_run


def infinitebench_tasks(source: Path | None, names: Sequence[str] = ()) -> list[Task]:
    """All twelve tasks.

    Args:
        source: the folder of the published .jsonl files (``longbook_qa_eng.jsonl`` and so on), or the data set's hub
            id; tasks on documents refuse without it.
        names: tasks that will be kept; of others no file is read. Empty for all.

    Raises:
        UserError: no such folder, or a damaged file.
    """
    suite = "infinitebench"
    generated = [
        Task("passkey", suite, 6, metrics.first_number, partial(_passkey, 5, 0)),
        Task("number_string", suite, 12, metrics.first_number, partial(_passkey, 5, 5)),
        Task("kv_retrieval", suite, 50, metrics.word_present, _pairs, least=2),
        Task("math_find", suite, 3, metrics.first_value, _find_value, least=5),
        Task("math_calc", suite, 30_000, metrics.running_values, _calculation, least=2, scales=True),
        Task("code_run", suite, 5, metrics.last_integer, _code_run, least=12),
    ]
    return generated + [
        document_task(kind, source if not names or kind.name in names else None) for kind in DOCUMENTS
    ]


def _passkey(digits: int, doubled: int, size: int, rng: Random, number: int) -> Draft:
    """A key among ``size`` lines of noise.

    Args:
        doubled: how many digits more, each a copy of its neighbour (number_string).
    """
    key = [str(rng.randint(1, 9)), *(str(rng.randint(0, 9)) for _ in range(digits - 1))]
    for _ in range(doubled):
        place = rng.randrange(len(key))
        key.insert(place, key[place])
    secret = "".join(key)
    what = "sequence of digits" if doubled else "pass key"
    fact = f"The {what} is {secret}. Remember it. {secret} is the {what}."
    depth = number % DEPTHS / (DEPTHS - 1)
    context = "\n".join(with_needles([NOISE] * size, [fact], [depth]))
    prompt = (
        f"Much of the text below does not matter, but one important fact is hidden in it. Find the {what} and remember "
        f"it; you will be asked for it.\n\n{context}\n\nWhat is the {what}?"
    )
    return Draft(prompt, f"\n\nThe {what} is", (secret,), {"depth": round(depth, 4)})


def _pairs(size: int, rng: Random, number: int) -> Draft:
    """The value of one key in a JSON object of ``size`` random pairs; the key's place sweeps with the number."""
    pairs = {magic("uuids", rng): magic("uuids", rng) for _ in range(size)}
    place = (number * 7 % 100) * size // 100
    key = list(pairs)[place]
    prompt = (
        "Look up the value of the given key in the JSON object below.\n\n"
        f"{json.dumps(pairs)}\n\nKey: {json.dumps(key)}"
    )
    return Draft(prompt, "\nThe value of this key is", (pairs[key],), {"depth": round(place / size, 4)})


def _find_value(size: int, rng: Random, number: int) -> Draft:
    """An order statistic of a list of ``size`` integers between 0 and 99."""
    wanted = _QUESTIONS[number % len(_QUESTIONS)]
    low = rng.randint(0, 20)
    high = rng.randint(low + 20, 99)
    size += (size + 1) % 2  # odd, so that the median is one of the numbers
    values = [rng.randint(low, high) for _ in range(size)]
    ordered, distinct = sorted(values), sorted(set(values))
    answer = {
        "largest": distinct[-1],
        "second largest": distinct[-min(2, len(distinct))],
        "third largest": distinct[-min(3, len(distinct))],
        "smallest": distinct[0],
        "second smallest": distinct[min(1, len(distinct) - 1)],
        "third smallest": distinct[min(2, len(distinct) - 1)],
        "median": ordered[size // 2],
    }[wanted]
    prompt = f"Find the {wanted} number in the list below.\n\n{values}\n\nThe list above is all there is."
    return Draft(prompt, f"\nThe {wanted} number of the list is:", (str(answer),), {"question": wanted})


def _calculation(size: int, rng: Random, number: int) -> Draft:
    """Every running value of a sum of ``size`` terms that stays between 0 and 99."""
    value = rng.randint(0, 99)
    terms, running = [str(value)], [value]
    for _ in range(size - 1):
        step = rng.randint(-value, 99 - value) or (1 if value < 99 else -1)
        value += step
        terms.append(f"{'+' if step > 0 else '-'} {abs(step)}")
        running.append(value)
    prompt = (
        "Work out the expression below from left to right and write down every value on the way, separated by commas, "
        f"beginning with the first number.\n\n{' '.join(terms)}"
    )
    return Draft(prompt, "\nThe values on the way are:", tuple(map(str, running)))


def _code_run(size: int, rng: Random, number: int) -> Draft:
    """The result of a chain of calls among ``size`` one-line functions; each adds a number to the next one's."""
    layers = _LAYERS[number % len(_LAYERS)]
    names = [f"func_{i}" for i in rng.sample(range(10 * size), size)]
    added = {name: rng.choice([n for n in range(-12, 18) if n]) for name in names}
    chain = rng.sample(names, layers)
    calls = dict(pairwise(chain))
    lines = []
    for name in names:
        amount = f"{'+' if added[name] > 0 else '-'} {abs(added[name])}"
        inner = f"{calls[name]}(x)" if name in calls else "x"
        lines.append(f"def {name}(x):\n    return {inner} {amount}\n")
    x = rng.randint(-10, 10)
    answer = x + sum(added[name] for name in chain)
    body = "\n".join(lines)
    prompt = (
        f"Read the Python functions below, then work out a call.\n\n{body}\n\nWhat does {chain[0]}({x}) return? Write "
        "the number only."
    )
    return Draft(prompt, f"\nThe return value of {chain[0]}({x}) is", (str(answer),), {"layers": layers})


@dataclass(frozen=True)
class Documents:
    """A task on published documents.

    Attributes:
        references: (row) -> the right answers.
        ask: (row) -> instruction before the document, question after it, beginning of the answer.
    """

    name: str
    new_tokens: int
    score: Score
    references: Callable[[dict[str, Any]], tuple[str, ...]]
    ask: Callable[[dict[str, Any]], tuple[str, str, str]]


def _answers(row: dict[str, Any]) -> tuple[str, ...]:
    answer = row["answer"]
    return tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)


def _lettered(row: dict[str, Any]) -> tuple[str, ...]:
    """The letter of the right option and its text; rows give the text, the text and its letter, or the letter."""
    answer, options = _answers(row)[0], row["options"]
    place = options.index(answer) if answer in options else _LETTERS.index(answer)
    return _LETTERS[place], options[place]


def _options(row: dict[str, Any]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(_LETTERS, row["options"], strict=False))


DOCUMENTS = (
    Documents(
        "longbook_sum_eng", 1200, metrics.rouge_lsum, _answers,
        lambda row: ("Summarize the book below.", "", "Summary:"),
    ),
    Documents(
        "longbook_qa_eng", 40, metrics.token_f1, _answers,
        lambda row: ("Read the book and answer the question, as briefly as you can.",
                     f"Question: {row['input']}", "Answer:"),
    ),
    Documents(
        "longbook_choice_eng", 40, metrics.option_chosen, _lettered,
        lambda row: ("Read the book and choose the right answer.",
                     f"Question: {row['input']}\nOnly one of these is right:\n{_options(row)}",
                     "The letter of the right answer is"),
    ),
    Documents(
        "longdialogue_qa_eng", 40, metrics.name_present, _answers,
        lambda row: ('One character\'s name is replaced by "$$MASK$$" in the script below. Find out whose it is.',
                     "", 'The name hidden behind "$$MASK$$" is'),
    ),
    Documents(
        "longbook_qa_chn", 40, metrics.character_f1, _answers,
        lambda row: ("请根据下面的书回答问题，回答尽量简短。", f"问题：{row['input']}", "答案："),
    ),
    Documents(
        "code_debug", 5, metrics.bug_named, _lettered,
        lambda row: ("One function in the code below has an obvious bug, put there on purpose. Find it.",
                     f"Which function has the bug?\n{_options(row)}",
                     "The function with the bug is option"),
    ),
)  # fmt: skip


def document_task(kind: Documents, source: Path | None) -> Task:
    """The task on the documents of one file; without the file, a task that says what is missing."""
    rows = None if source is None else published.infinitebench(source, kind.name)
    draft = partial(_document, kind, source)
    count = None if rows is None else len(rows)
    return Task(kind.name, "infinitebench", kind.new_tokens, kind.score, draft, fixed=True, samples=count)


def _document(kind: Documents, source: Path | None, size: int, rng: Random, number: int) -> Draft:
    rows = None if source is None else published.infinitebench(source, kind.name)
    if rows is None:
        raise Absent(
            f"task {kind.name} asks about documents that are not here; put {kind.name}.jsonl of "
            f"{published.INFINITEBENCH} into a folder and give it as --infinitebench FOLDER, or leave the task out."
        )
    if kind.score is metrics.rouge_lsum:
        metrics.rouge_scorer()
    try:
        row = rows[number]
        before, after, cue = kind.ask(row)
        prompt = "\n\n".join(part for part in (before, row["context"], after) if part)
        return Draft(prompt, f"\n{cue}", kind.references(row), {"id": row.get("id", number)})
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"--infinitebench: row {number + 1} of {kind.name}.jsonl in {source} is not as published "
            f"({type(error).__name__}: {error}); fetch the file again."
        ) from None
