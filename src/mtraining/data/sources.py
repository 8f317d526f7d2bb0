"""What a source is: an ordered, repeatable stream of named documents, each read as late as possible.

A stream yields `Item` (a document to be read and encoded, perhaps in another process) or `Skipped` (something that
should have been a document, by name and reason). The order depends on names alone, never on the file system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtraining.data.conversation import Completion, Conversation

EMPTY = "empty"
UNDECODABLE = "not UTF-8 text"
BINARY = "binary (NUL bytes)"
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Skipped:
    """A document, file or row that was left out."""

    name: str
    reason: str


class Note(Skipped):
    """What was left out by choice: columns that are not read, documents of a length that was not asked for."""


@dataclass(frozen=True)
class Item:
    """One document: its text, its token ids (int64), a conversation, or the files to join, each with the header line
    before it."""

    name: str
    text: str | None = None
    files: tuple[tuple[str, Path], ...] = ()
    ids: np.ndarray | None = None
    chat: Conversation | Completion | None = None


@dataclass(frozen=True)
class Source:
    """items() restarts the stream; count is its length where known; signature changes when the input does; left_aside
    names the files that were found beside it and are not read."""

    label: str
    items: Callable[[], Iterator[Item | Skipped]]
    signature: str
    count: int | None = None
    left_aside: tuple[Skipped, ...] = ()


def files_signature(files: list[Path], root: Path) -> str:
    """A digest of relative names, sizes and modification times: cheap, and any edit changes it."""
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(f"{path.relative_to(root).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
