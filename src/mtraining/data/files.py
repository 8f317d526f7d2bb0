"""Files below a folder, what kind each is by its suffix, and reading them through compression.

Suffixes count in any case. Hidden files, caches and links to folders are not read; whatever is left aside is returned
by name, so that nothing goes missing in silence.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from mtraining.data.sources import UNREADABLE, Skipped

TEXT = (".txt", ".text", ".md", ".markdown", ".rst")
ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)
"""What reading a file may raise, whatever its compression."""

HIDDEN = "hidden"
CACHE = "caches and installed packages"
TESTS = "tests"
FOLDER_LINK = "links to folders"
NOT_A_FILE = "broken links and special files"
UNREADABLE_FOLDER = "unreadable folder"

_CACHES = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_TESTS = {"test", "tests", "idle_test"}


def suffixes(path: Path) -> tuple[str, str]:
    """(suffix, compression) in lower case: (".jsonl", ".gz") of Rows.JSONL.gz; either may be empty."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in COMPRESSIONS else (last, "")


def kind_of(path: Path) -> str | None:
    """text, jsonl or parquet by suffix, None for any other. Parquet compresses itself, and is read in any order."""
    suffix, compression = suffixes(path)
    if suffix in TEXT:
        return "text"
    kind = ROWS.get(suffix)
    return None if kind == "parquet" and compression else kind


def _open_zst(path: Path) -> BinaryIO:
    import pyarrow  # only when needed: worker processes import this

    return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".zst": _open_zst,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed as its suffix says. Reading may raise any of :data:`DAMAGED`."""
    with _OPENERS[suffixes(path)[1]](path) as stream:
        yield stream


def damage(path: Path) -> str:
    """What to say of a file whose reading raised one of :data:`DAMAGED`."""
    compression = suffixes(path)[1]
    return f"damaged {compression}" if compression else UNREADABLE


@dataclass(frozen=True)
class Walk:
    """What lies below a folder: `files`, sorted by relative path, and what is not read whatever its kind, by name."""

    files: list[Path]
    aside: list[Skipped]


def walk(root: Path, *, tests: bool = True) -> Walk:
    """Every file below `root` that a source may take.

    Hidden files and folders, caches and installed third-party packages are left aside, links to folders are not
    followed, and test folders are entered only if `tests`.
    """
    files: list[Path] = []
    aside: list[Skipped] = []

    def shown(path: Path) -> str:
        return path.relative_to(root).as_posix()

    def unreadable(error: OSError) -> None:
        aside.append(Skipped(shown(Path(str(error.filename))) + "/", UNREADABLE_FOLDER))

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        entered = []
        for name in subfolders:
            reason = _closed(Path(folder, name), tests)
            if reason:
                aside.append(Skipped(shown(Path(folder, name)) + "/", reason))
            else:
                entered.append(name)
        subfolders[:] = entered
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                aside.append(Skipped(shown(path), HIDDEN))
            elif not path.is_file():
                aside.append(Skipped(shown(path), NOT_A_FILE))
            else:
                files.append(path)
    files.sort(key=shown)
    aside.sort(key=lambda entry: entry.name)
    return Walk(files, aside)


def _closed(folder: Path, tests: bool) -> str:
    """Why a folder is not entered, or nothing."""
    if folder.name.startswith("."):
        return HIDDEN
    if folder.name in _CACHES:
        return CACHE
    if folder.is_symlink():
        return FOLDER_LINK
    return TESTS if not tests and folder.name in _TESTS else ""
