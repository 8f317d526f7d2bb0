"""Words, numbers and identifiers that tasks hide and ask for."""

from __future__ import annotations

import string
import uuid
from functools import cache
from importlib import resources
from random import Random

from mtraining.errors import UserError

KINDS = ("words", "numbers", "uuids")


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """The ``nouns``, ``adjectives`` or ``verbs`` of the package wonderwords, sorted, each once.

    Raises:
        UserError: the package is missing.
    """
    try:
        folder = resources.files("wonderwords.assets")
    except ModuleNotFoundError:
        raise UserError(
            "RULER's and the needle's words come from the package wonderwords; install mtraining[evaluate]."
        ) from None
    lines = folder.joinpath(f"{kind.removesuffix('s')}list.txt").read_text(encoding="utf-8").split("\n")
    return tuple(sorted({line.strip() for line in lines if line.strip()}))


@cache
def vocabulary() -> tuple[str, ...]:
    """All distinct nouns, adjectives and verbs: 8,166 words of wonderwords 3."""
    return tuple(sorted({*word_list("nouns"), *word_list("adjectives"), *word_list("verbs")}))


def magic(kind: str, rng: Random) -> str:
    """A key or a value: an adjective-noun pair, seven digits, or a version-4 UUID."""
    if kind == "words":
        return f"{rng.choice(word_list('adjectives'))}-{rng.choice(word_list('nouns'))}"
    if kind == "numbers":
        return str(rng.randint(1_000_000, 9_999_999))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(kind: str, count: int, rng: Random) -> list[str]:
    """``count`` different keys or values of one kind."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[magic(kind, rng)] = None
    return list(found)


def letters(length: int, rng: Random, alphabet: str = string.ascii_uppercase) -> str:
    """A random string of letters."""
    return "".join(rng.choices(alphabet, k=length))


def distinct_words(count: int, rng: Random) -> list[str]:
    """``count`` different words: of the vocabulary in random order, then made up where it is used up."""
    known = vocabulary()
    found = dict.fromkeys(rng.sample(known, min(count, len(known))))
    while len(found) < count:
        found[letters(rng.randint(6, 10), rng, string.ascii_lowercase)] = None
    return list(found)
