"""Whether token shards speak the language of a model: the same words under the same numbers."""

from __future__ import annotations

import shlex
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


def vocabulary_difference(shards: TokenShards, tokenizer: Any) -> str | None:
    """A token on which the shards' tokenizer and ``tokenizer`` disagree, in words; None where they agree.

    The plain vocabularies must be equal: with more or fewer words the same text has other tokens. Added tokens (end of
    text, padding, chat marks) may differ as long as no shard holds one that the model knows otherwise.
    """
    from tokenizers import Tokenizer

    path = shards.tokenizer_path / "tokenizer.json"
    try:
        theirs = Tokenizer.from_file(str(path))
    except Exception as error:  # the parser raises plain Exceptions
        raise UserError(
            f"dataset '{shards.path}': {path} cannot be read ({error}); prepare it again"
        ) from error
    data, model = theirs.get_vocab(with_added_tokens=True), dict(tokenizer.get_vocab())
    added = {token.content for token in theirs.get_added_tokens_decoder().values()}
    added |= {str(token) for token in tokenizer.added_tokens_decoder.values()}
    for token in sorted(data.keys() | model.keys(), key=lambda token: (data.get(token, 2**62), token)):
        here, there = data.get(token), model.get(token)
        if here == there or (token in added and (here is None or here > shards.max_token_id)):
            continue
        places = [f"{number}" if number is not None else "none" for number in (here, there)]
        return f"token {token!r} is {places[0]} there and {places[1]} in the model's"
    return None
