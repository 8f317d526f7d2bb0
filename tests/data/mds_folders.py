"""MDS folders, written by mosaicml-streaming itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

needs_streaming = pytest.mark.skipif(
    importlib.util.find_spec("streaming") is None, reason="needs mosaicml-streaming"
)
# As ProLong's are.
COLUMNS = {"input_ids": "ndarray:uint32", "indices": "ndarray:uint32", "domain": "str", "length": "uint64"}


def write_mds(
    folder: Path, rows: Sequence[dict[str, Any]], columns: dict[str, str] = COLUMNS, **options: Any
) -> Path:
    from mtraining.data.mds import _library

    with _library("format").MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for row in rows:
            writer.write(row)
    return folder


def packed(domain: str, *documents: Sequence[int]) -> dict[str, Any]:
    """A row of ProLong: documents one after another, and where each lies."""
    ends = np.cumsum([len(document) for document in documents])
    bounds = [[end - len(document), end] for document, end in zip(documents, ends, strict=True)]
    ids = np.concatenate([np.asarray(document, dtype=np.uint32) for document in documents])
    return {
        "input_ids": ids,
        "indices": np.array(bounds, dtype=np.uint32),
        "domain": domain,
        "length": np.uint64(ids.size),
    }
