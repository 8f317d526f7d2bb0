"""Associative recall: sequences whose answers cannot be foreseen without looking far back.

A sequence is cut into slots of four tokens, most of them dots. A *pair* is one token that stands for a key and its
value: there is a token for each of them. A *question* is a token for a key, followed by its value, which only the key's
pair tells. Distances between a question and its pair are drawn uniformly.

The model is trained on the answers alone, as on a conversation. So all that there is to learn is what a pair's token
stands for, and to look it up. One layer of attention can do that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from mtraining.data import PrepareOptions, prepare
from mtraining.errors import UserError

SLOT = 4
DOT, END = range(2)  # token ids; "<end>" is there because a tokenizer must have one
_MARKS = (".", "<end>")
_LETTERS = 0x4E00  # every other token is a letter from here on
_TRIES = 10_000

# Everything as it stands; the assistant's words are what is trained.
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Answer:
    """An answer in a sequence.

    Attributes:
        position: of the value that only the pair tells.
        distance: tokens between the pair and the question.
    """

    position: int
    distance: int


@dataclass(frozen=True)
class Vocabulary:
    """Which token stands for what: marks, then values, then a question for each key, then its pairs.

    Attributes:
        keys, values: how many kinds there are of each.
    """

    keys: int
    values: int

    def value(self, value: int) -> int:
        """The token of a value."""
        return len(_MARKS) + value

    def question(self, key: int) -> int:
        """The token that asks for a key's value."""
        return self.value(self.values) + key

    def pair(self, key: int, value: int) -> int:
        """The token that says which value a key has."""
        return self.question(self.keys) + key * self.values + value

    def asked(self, token: int) -> int | None:
        """The key of a question; None for another token."""
        key = token - self.question(0)
        return key if 0 <= key < self.keys else None

    def told(self, token: int) -> int | None:
        """The key of a pair; None for another token."""
        number = token - self.pair(0, 0)
        return number // self.values if number >= 0 else None

    def words(self) -> list[str]:
        """The text of each token."""
        return [*_MARKS, *(chr(_LETTERS + number) for number in range(self.pair(self.keys, 0) - len(_MARKS)))]

    @classmethod
    def of(cls, corpus: Mapping[str, Any]) -> Vocabulary:
        """That of a plan's section `corpus`."""
        return cls(corpus["keys"], corpus["values"])


def sequence(seq_len: int, corpus: Mapping[str, Any], seed: Sequence[int]) -> np.ndarray:
    """int64 (seq_len + 1,): one sequence, and one token more for the last label.

    Args:
        corpus: ``questions``, each of which has its own pair; ``pairs`` that nobody asks for; ``keys`` and ``values``,
            how many kinds there are of each.

    Raises:
        UserError: more slots or keys are asked for than there are.
    """
    random, words = np.random.default_rng(list(seed)), Vocabulary.of(corpus)
    questions, pairs, count = corpus["questions"], corpus["pairs"], seq_len // SLOT
    if questions + pairs > words.keys:
        raise UserError(
            f"corpus.keys={words.keys} is less than questions and pairs together ({questions + pairs}); give more."
        )
    slots = np.full((count, SLOT), DOT, dtype=np.int64)
    keys = random.choice(words.keys, size=questions + pairs, replace=False).tolist()
    values = random.integers(words.values, size=questions + pairs).tolist()
    free = np.ones(count, dtype=bool)
    for number in range(questions):
        for _ in range(_TRIES):
            distance = int(random.integers(1, count))
            slot = int(random.integers(count - distance))
            if free[slot] and free[slot + distance]:
                break
        else:
            raise UserError(
                f"corpus.questions={questions} do not fit {seq_len} tokens; ask for fewer, or raise "
                "config.train.seq_len."
            )
        slots[slot, 0] = words.pair(keys[number], values[number])
        slots[slot + distance, :2] = words.question(keys[number]), words.value(values[number])
        free[[slot, slot + distance]] = False
    others = random.choice(np.flatnonzero(free), size=pairs, replace=False)
    for slot, key, value in zip(others, keys[questions:], values[questions:], strict=True):
        slots[slot, 0] = words.pair(key, value)
    return np.append(slots.reshape(-1), DOT)


def answers(tokens: Sequence[int], words: Vocabulary) -> list[Answer]:
    """Every answer of a sequence, in order."""
    where: dict[int, int] = {}
    found = []
    for start in range(0, len(tokens) - SLOT + 1, SLOT):
        told, asked = words.told(tokens[start]), words.asked(tokens[start])
        if told is not None:
            where[told] = start
        elif asked is not None:
            found.append(Answer(start + 1, start - where[asked]))
    return found


def conversation(tokens: Sequence[int], words: Vocabulary) -> list[dict[str, str]]:
    """A sequence as messages: the assistant says the answers, and the user all between them."""
    text = words.words()
    ends = [
        0,
        *(edge for one in answers(tokens, words) for edge in (one.position, one.position + 1)),
        len(tokens),
    ]
    return [
        {
            "role": ("user", "assistant")[number % 2],
            "content": "".join(text[token] for token in tokens[first:end]),
        }
        for number, (first, end) in enumerate(pairwise(ends))
    ]


def make(study: Path, corpus: Mapping[str, Any], seq_len: int) -> str:
    """Write ``corpus/tokens`` and ``corpus/held-out``; what is there already is kept."""
    folder = study / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    words = Vocabulary.of(corpus)
    tokenizer = Tokenizer(
        WordLevel({word: number for number, word in enumerate(words.words())}, unk_token=".")
    )
    tokenizer.pre_tokenizer = Split(Regex(r"<end>|."), "isolated")
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    named.save_pretrained(folder / "tokenizer")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")

    def rows(part: int, count: int) -> Iterator[str]:
        for number in range(count):
            tokens = sequence(seq_len, corpus, (part, number)).tolist()
            yield json.dumps({"name": str(number), "messages": conversation(tokens, words)}) + "\n"

    told = []
    for part, name, count in ((0, "tokens", corpus["documents"]), (1, "held-out", corpus["held_out"])):
        source = folder / f"{name}.jsonl"
        if not source.exists():
            fresh = source.with_suffix(".new")
            with open(fresh, "w", encoding="utf-8") as file:
                file.writelines(rows(part, count))
            fresh.rename(source)
        options = PrepareOptions(
            sources=(str(source),),
            out=folder / name,
            tokenizer=str(folder / "tokenizer"),
            name_column="name",
            chat_template=template,
            train_on="assistant",
        )
        told.append(prepare(options, progress=False).render(limit=3))
    return "\n".join(told)
