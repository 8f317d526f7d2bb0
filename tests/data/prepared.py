"""Helpers of the data tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def write_rows(path: Path, documents: Mapping[str, str]) -> Path:
    """A .jsonl file of {"id", "text"} rows."""
    path.write_text(
        "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items())
    )
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
