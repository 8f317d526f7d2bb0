"""What a source is: an ordered, repeatable stream of named documents, each read as late as possible.

A stream yields `Item` (a document to be read and encoded, perhaps in another process) or `Skipped` (something that
should have been a document, by name and reason). The order depends on names alone, never on the file system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

EMPTY = "empty"
UNDECODABLE = "not UTF-8 text"
BINARY = "binary (NUL bytes)"
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Skipped:
    """A document, file or row that was left out."""

    name: str
    reason: str


@dataclass(frozen=True)
class Item:
    """One document: its text, or the files to join, each with the header line that precedes it."""

    name: str
    text: str | None = None
    files: tuple[tuple[str, Path], ...] = ()


@dataclass(frozen=True)
class Source:
    """items() restarts the stream; count is its length where known; signature changes when the input does."""

    label: str
    items: Callable[[], Iterator[Item | Skipped]]
    signature: str
    count: int | None = None
    ignored_files: dict[str, int] = field(default_factory=dict)


def files_signature(files: list[Path], root: Path) -> str:
    """A digest of relative names, sizes and modification times: cheap, and any edit changes it."""
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(f"{path.relative_to(root).as_posix()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_item(item: Item) -> tuple[str, list[Skipped]]:
    """The text of a document and the files of it that had to be left out; blank text means nothing was usable.

    Files are joined in their given order, each ending in a newline. A document that is itself one file or row is
    reported under its own name.
    """
    if item.text is not None:
        try:
            item.text.encode("utf-8")
        except UnicodeEncodeError:  # lone surrogates, as JSON escapes can spell them
            return "", [Skipped(item.name, UNDECODABLE)]
        return item.text, [] if item.text.strip() else [Skipped(item.name, EMPTY)]
    pieces: list[str] = []
    skipped: list[Skipped] = []
    for header, path in item.files:
        text, reason = _read_file(path)
        if reason:
            skipped.append(Skipped(header or item.name, reason))
        elif header:
            pieces.append(f"# file: {header}\n{text}" + ("" if text.endswith("\n") else "\n"))
        else:
            pieces.append(text)
    return "".join(pieces), skipped


def _read_file(path: Path) -> tuple[str, str]:
    """(text, "") or ("", reason)."""
    try:
        data = path.read_bytes()
    except OSError:
        return "", UNREADABLE
    if b"\0" in data:
        return "", BINARY
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", UNDECODABLE
    return (text, "") if text.strip() else ("", EMPTY)
