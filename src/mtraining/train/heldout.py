"""Held-out text: which sequences of a prepared folder an evaluation reads, and that they are fit for it.

A sequence is read from the beginning of a document, so that a token's position is its place in its document. Only when
every document has given its first sequence do second ones come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtraining.data import TokenShards
from mtraining.data.vocabulary import vocabulary_difference
from mtraining.errors import UserError, first_line
from mtraining.train.config import Config


@dataclass(frozen=True)
class HeldOut:
    """The sequences of an evaluation.

    Attributes:
        starts: by length, int64 (sequences,): where in the stream of tokens each sequence begins.
    """

    shards: TokenShards
    starts: dict[int, np.ndarray]

    def tokens(self, length: int, number: int) -> list[int]:
        """One sequence of ``length`` tokens."""
        first = int(self.starts[length][number])
        found: list[int] = self.shards.gather(np.arange(first, first + length)).tolist()
        return found

    def names(self, length: int) -> list[str]:
        """Of the document that each sequence of ``length`` tokens begins in."""
        return [self.shards.name(self.shards.document_at(int(start))) for start in self.starts[length]]

    def documents(self) -> list[int]:
        """Numbers of the documents that are read, ascending; in `concat` mode those that sequences begin in."""
        return sorted(
            {self.shards.document_at(int(start)) for starts in self.starts.values() for start in starts}
        )


def held_out(config: Config, training: Sequence[TokenShards]) -> HeldOut | None:
    """What `evaluate.data` gives, checked against the data that is trained on; None where there is none.

    Raises:
        UserError: data that is absent or damaged, the training data itself, another tokenizer's, ids outside of the
            vocabulary, or no text of a length.
    """
    path = config.evaluate.data
    if path is None:
        return None
    try:
        shards = TokenShards(path)
    except UserError as error:
        raise UserError(f"evaluate.data: {error}") from None
    # An identity may have to be read out of every token.
    alike = [source for source in training if source.num_tokens == shards.num_tokens]
    if alike and shards.identity in [source.identity for source in alike]:
        raise UserError(
            f"evaluate.data={path} holds the documents of {config.data.named}, so its loss would tell nothing "
            "of unseen text; hold documents out with mtraining prepare --holdout, or give other text."
        )
    _check_tokenizer(config, shards, training[0])
    words = config.model.config.get("vocab_size")
    if words is not None:
        check_words(shards, words)
    starts = {
        length: sequence_starts(shards, length, config.data.mode, config.evaluate.max_sequences)
        for length in config.evaluate_lengths
    }
    for length, found in starts.items():
        if not len(found):
            _refuse_length(config, shards, length)
    return HeldOut(shards, starts)


def sequence_starts(shards: TokenShards, length: int, mode: str, most: int) -> np.ndarray:
    """int64 (at most ``most``,): where sequences of ``length`` tokens begin in the stream.

    Args:
        mode: of `data.mode`: but for ``concat`` no sequence crosses a document's end, and shorter ones are left out.
    """
    if mode == "concat":
        return np.arange(min(shards.num_tokens // length, most), dtype=np.int64) * length
    whole = shards.lengths // length  # sequences that each document has
    found: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    for turn in range(int(whole.max())):
        found.append(shards.starts[whole > turn] + turn * length)
        if sum(map(len, found)) >= most:
            break
    return np.concatenate(found)[:most]


def check_words(shards: TokenShards, words: int) -> None:
    """Refuse ids outside of a vocabulary of so many words."""
    if shards.max_token_id >= words:
        raise UserError(
            f"evaluate.data={shards.path} holds token id {shards.max_token_id}, outside the model's vocabulary of "
            f"{words}; prepare it again with the model's tokenizer."
        )


def shared_documents(held: HeldOut, training: Sequence[TokenShards]) -> list[str]:
    """Names of the documents that an evaluation reads and that stand in the training data too, token for token."""
    found = []
    for number in held.documents():
        tokens = held.shards.document(number)
        if any(_holds(source, tokens) for source in training):
            found.append(held.shards.name(number))
    return found


def _holds(source: TokenShards, tokens: np.ndarray) -> bool:
    same_length = np.flatnonzero(source.lengths == len(tokens))
    return any(_equal(tokens, source.document(int(other))) for other in same_length)


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    # Most documents of one length differ at once.
    return np.array_equal(one[:64], other[:64]) and np.array_equal(one, other)


def _check_tokenizer(config: Config, shards: TokenShards, training: TokenShards) -> None:
    """The training data's own is the model's, or meant to be another one."""
    if shards.tokenizer_path == training.tokenizer_path:
        return
    difference = vocabulary_difference(shards, shards_tokenizer(training), whose="the other")
    if difference is not None:
        raise UserError(
            f"evaluate.data={shards.path} was prepared with another tokenizer than {config.data.named} "
            f"({difference}); prepare it again with --tokenizer {training.tokenizer_path}."
        )


def shards_tokenizer(shards: TokenShards) -> Any:
    """The tokenizer that shards were made with, of transformers."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(shards.tokenizer_path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"dataset '{shards.path}': its tokenizer {shards.tokenizer_path} cannot be read "
            f"({first_line(error)}); prepare it again."
        ) from None


def _refuse_length(config: Config, shards: TokenShards, length: int) -> None:
    if config.data.mode == "concat":
        raise UserError(
            f"evaluate.lengths: {length} tokens are more than the {shards.num_tokens} of "
            f"evaluate.data={shards.path}; ask for shorter sequences, or add text."
        )
    longest = int(shards.lengths.argmax())
    raise UserError(
        f"evaluate.lengths: no document of evaluate.data={shards.path} has {length} tokens, the longest, "
        f"'{shards.name(longest)}', has {int(shards.lengths[longest])}; ask for shorter sequences, or add longer "
        "documents."
    )
