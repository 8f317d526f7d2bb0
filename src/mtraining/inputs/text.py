"""Text files: read as they are handed around, UTF-8 with or without a byte order mark, plain or compressed by gzip; and
written at once."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

_GZIP = b"\x1f\x8b"


def read_text(path: Path) -> str:
    """The text of one file.

    Raises:
        OSError: it cannot be read, or is damaged.
        ValueError: it is not UTF-8.
    """
    content = path.read_bytes()
    if content.startswith(_GZIP):
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error) as error:
            raise OSError(f"damaged gzip file: {error}") from error
    return content.decode("utf-8-sig")


def replace_text(path: Path, text: str) -> None:
    """Write a text file at once: whoever reads meanwhile, another rank or a browser, meets the old text or the new one.

    Raises:
        OSError: it cannot be written; the old one is still there.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def text_files(path: Path) -> list[Path]:
    """The file itself, or every .txt and .txt.gz file below a folder, in order."""
    if not path.is_dir():
        return [path]
    return sorted(file for pattern in ("*.txt", "*.txt.gz") for file in path.rglob(pattern))
