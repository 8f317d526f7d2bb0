"""The text of a document, read as late as possible: here or in a worker process."""

from __future__ import annotations

from pathlib import Path

from mtraining.data.files import DAMAGED, damage, open_file
from mtraining.data.sources import BINARY, EMPTY, UNDECODABLE, Item, Skipped


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
        with open_file(path) as file:
            data = file.read()
    except DAMAGED:
        return "", damage(path)
    if b"\0" in data:
        return "", BINARY
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", UNDECODABLE
    return (text, "") if text.strip() else ("", EMPTY)
