"""Train Hugging Face language models on very long contexts with dynamic sparse ring attention.

The public names below are loaded when first used, so that `import mtraining` stays quick.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtraining.errors import UserError

if TYPE_CHECKING:
    from mtraining.layout import build_layout
    from mtraining.model import ParallelLM, parallelize, use_expandable_segments
    from mtraining.pattern import build_pattern
    from mtraining.ring import IndexTape, Observer, sparse_ring_attention

__all__ = [
    "IndexTape",
    "Observer",
    "ParallelLM",
    "UserError",
    "build_layout",
    "build_pattern",
    "parallelize",
    "sparse_ring_attention",
    "use_expandable_segments",
]


def _silence(logger: str, words: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: words not in record.getMessage())


# transformers loads torchao where it is installed. On a machine without a GPU torchao then tells of its parts for GPUs,
# and torch of enums of torchao's; both before anything of torchao is used.
_silence("torchao", "Failed to load")
_silence("torch.utils._pytree", "is an Enum subclass")

_HOME = {
    "IndexTape": "ring",
    "Observer": "ring",
    "ParallelLM": "model",
    "build_layout": "layout",
    "build_pattern": "pattern",
    "parallelize": "model",
    "sparse_ring_attention": "ring",
    "use_expandable_segments": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mtraining' has no attribute {name!r}")
    value = getattr(import_module(f"mtraining.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
