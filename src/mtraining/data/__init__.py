"""Text -> tokens -> full-length or packed sequences, of one source or several -> sharded, laid-out batches.

Names are resolved on first use: the worker processes of :func:`prepare` import this package and must not pay
for importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtraining.data.dataset import DataSource, SequenceDataset
    from mtraining.data.loader import ReaderDied, build_loader, read, step_plan
    from mtraining.data.options import PrepareOptions, PrepareSummary
    from mtraining.data.preparation import prepare
    from mtraining.data.shards import TokenShards
    from mtraining.data.sources import Skipped
    from mtraining.data.tokenizer import save_byte_tokenizer
    from mtraining.data.vocabulary import check_vocabulary
    from mtraining.data.windows import DatasetReport

_HOME = {
    "DataSource": "dataset",
    "DatasetReport": "windows",
    "SequenceDataset": "dataset",
    "ReaderDied": "loader",
    "build_loader": "loader",
    "read": "loader",
    "step_plan": "loader",
    "PrepareOptions": "options",
    "PrepareSummary": "options",
    "prepare": "preparation",
    "TokenShards": "shards",
    "Skipped": "sources",
    "check_vocabulary": "vocabulary",
    "save_byte_tokenizer": "tokenizer",
}

__all__ = [
    "DataSource",
    "DatasetReport",
    "PrepareOptions",
    "PrepareSummary",
    "ReaderDied",
    "SequenceDataset",
    "Skipped",
    "TokenShards",
    "build_loader",
    "check_vocabulary",
    "prepare",
    "read",
    "save_byte_tokenizer",
    "step_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mtraining.data' has no attribute {name!r}")
    value = getattr(import_module(f"mtraining.data.{_HOME[name]}"), name)
    globals()[name] = value
    return value
