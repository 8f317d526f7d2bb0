"""Whether token shards speak the language of a model: the same words under the same numbers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mtraining.data.shards import TokenShards
from mtraining.errors import UserError


def check_vocabulary(shards: TokenShards, tokenizer: Any, named: str, unless: str) -> None:
    """Refuse shards that were prepared with another tokenizer than the model's.

    A text encoded otherwise is noise to a pretrained model, though every id may lie in its vocabulary.

    Args:
        tokenizer: the model's, of transformers.
        named: what to give `mtraining prepare --tokenizer` for it.
        unless: how messages end: what lets the difference pass.

    Raises:
        UserError: with a token that differs and the command to prepare again.
    """
    difference = vocabulary_difference(shards, tokenizer)
    if difference is None:
        return
    sources = shards.meta.get("sources") or ["SOURCE..."]
    shown = " ".join(shlex.quote(str(source)) for source in sources) if len(sources) < 4 else "SOURCE..."
    raise UserError(
        f"dataset '{shards.path}' was prepared with tokenizer '{shards.meta.get('tokenizer')}', which is not the "
        f"model's ({difference}); prepare it again: mtraining prepare {shown} {shards.path}-again --tokenizer "
        f"{shlex.quote(named)}{unless}"
    )


def check_same_vocabulary(mixed: Sequence[TokenShards]) -> None:
    """Refuse sources that were prepared with different tokenizers: one model would read two languages.

    Raises:
        UserError: naming two folders, and a token that differs.
    """
    first, others = mixed[0], mixed[1:]
    words = _words(first) if others else None
    for other in others:
        assert words is not None
        difference = _difference(words, _words(other), max(first.max_token_id, other.max_token_id))
        if difference is not None:
            token, here, there = difference
            told = f"token {token!r} is {here} in the one and {there} in the other"
        elif first.eos_token_id != other.eos_token_id:
            told = f"documents end with token {first.eos_token_id} in the one and {other.eos_token_id} in the other"
        else:
            continue
        raise UserError(
            f"data.sources: '{first.path}' and '{other.path}' were prepared with different tokenizers ({told}); "
            "prepare one of them again with the other's --tokenizer"
        )


def vocabulary_difference(shards: TokenShards, tokenizer: Any, whose: str = "the model's") -> str | None:
    """A token on which the shards' tokenizer and ``tokenizer`` disagree, in words; None where they agree.

    The plain vocabularies must be equal: with more or fewer words the same text has other tokens. Added tokens (end of
    text, padding, chat marks) may differ as long as no shard holds one that the model knows otherwise.

    Args:
        whose: what messages call ``tokenizer``.
    """
    theirs = dict(tokenizer.get_vocab()), {str(token) for token in tokenizer.added_tokens_decoder.values()}
    found = _difference(_words(shards), theirs, shards.max_token_id)
    if found is None:
        return None
    token, here, there = found
    return f"token {token!r} is {here} there and {there} in {whose}"


Words = tuple[Mapping[str, int], set[str]]


def _words(shards: TokenShards) -> Words:
    """The number of every token of the shards' tokenizer, and which of them were added to its vocabulary."""
    from tokenizers import Tokenizer

    path = shards.tokenizer_path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the parser raises plain Exceptions
        raise UserError(
            f"dataset '{shards.path}': {path} cannot be read ({error}); prepare it again"
        ) from error
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return tokenizer.get_vocab(with_added_tokens=True), added


def _difference(one: Words, other: Words, max_token_id: int) -> tuple[str, str, str] | None:
    """A token on which two tokenizers disagree, and its number in each; added tokens that ``one`` lacks, or numbers
    above ``max_token_id``, may differ."""
    (data, added), (model, more) = one, other
    added = added | more
    for token in sorted(data.keys() | model.keys(), key=lambda token: (data.get(token, 2**62), token)):
        here, there = data.get(token), model.get(token)
        if here == there or (token in added and (here is None or here > max_token_id)):
            continue
        places = [f"{number}" if number is not None else "none" for number in (here, there)]
        return token, places[0], places[1]
    return None
