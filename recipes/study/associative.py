"""Associative recall: sequences that cannot be foreseen without looking far back.

A sequence is cut into slots of four tokens. A *pair* slot is "=", two tokens of a key, and a value. A *question* slot
is "?", the key of an earlier pair, and its value, which only that pair tells. All other slots are dots. The pair of a
question is drawn uniformly from the slots before it, and pairs that nobody asks for are among them.

Tokens are bytes: keys are of 128 to 191, values of 192 to 255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from mtraining.data import PrepareOptions, prepare

SLOT = 4
PAIR, QUESTION, DOT = ord("="), ord("?"), ord(".")
KEYS, VALUES = 128, 192  # first token of each
KINDS = 64  # tokens a key's parts and a value are drawn from


@dataclass(frozen=True)
class Answer:
    """An answer in a sequence.

    Attributes:
        position: of the value that only the pair tells.
        distance: tokens back to the pair's value.
    """

    position: int
    distance: int


def sequence(seq_len: int, questions: int, pairs: int, seed: Sequence[int]) -> np.ndarray:
    """int64 (seq_len + 1,): one sequence, and one token more for the last label.

    Args:
        questions: how many there are; each has its own pair.
        pairs: that nobody asks for.
    """
    random = np.random.default_rng(list(seed))
    slots = np.full((seq_len // SLOT, SLOT), DOT, dtype=np.int64)
    keys = random.choice(KINDS * KINDS, size=questions + pairs, replace=False)
    values = random.integers(KINDS, size=questions + pairs)
    free = np.ones(len(slots), dtype=bool)

    def put(slot: int, mark: int, number: int) -> None:
        key = keys[number]
        slots[slot] = (mark, KEYS + key // KINDS, KEYS + key % KINDS, VALUES + values[number])
        free[slot] = False

    # Later questions first: what they leave free is enough for the earlier ones.
    asked = np.sort(random.choice(np.arange(len(slots) // 8, len(slots)), size=questions, replace=False))[
        ::-1
    ]
    free[asked] = False
    for number, slot in enumerate(asked):
        put(int(slot), QUESTION, number)
        put(int(random.choice(np.flatnonzero(free[:slot]))), PAIR, number)
    for number, slot in enumerate(random.choice(np.flatnonzero(free), size=pairs, replace=False)):
        put(int(slot), PAIR, questions + number)
    return np.append(slots.reshape(-1), DOT)


def answers(tokens: Sequence[int]) -> list[Answer]:
    """Every answer of a sequence, in order."""
    where: dict[tuple[int, int], int] = {}
    found = []
    for start in range(0, len(tokens) - SLOT + 1, SLOT):
        mark, first, second, _ = tokens[start : start + SLOT]
        if mark == PAIR:
            where[first, second] = start
        elif mark == QUESTION:
            found.append(Answer(start + SLOT - 1, start - where[first, second]))
    return found


def make(study: Path, corpus: Mapping[str, Any], seq_len: int) -> str:
    """Write ``corpus/tokens`` and ``corpus/held-out``; what is there already is kept."""
    told = []
    for part, name, count in ((0, "tokens", corpus["documents"]), (1, "held-out", corpus["held_out"])):
        source = study / "corpus" / f"{name}.parquet"
        source.parent.mkdir(parents=True, exist_ok=True)
        if not source.exists():
            rows = [
                sequence(seq_len, corpus["questions"], corpus["pairs"], (part, number))
                for number in range(count)
            ]
            table = pyarrow.table(
                {"input_ids": rows, "name": [f"{name}-{number}" for number in range(count)]}
            )
            pyarrow.parquet.write_table(table, source)
        options = PrepareOptions(
            sources=(str(source),), out=study / "corpus" / name, tokenizer="byte", name_column="name"
        )
        told.append(prepare(options, progress=False).render(limit=3))
    return "\n".join(told)
