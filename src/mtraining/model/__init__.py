"""The Hugging Face side: build or load a model, parallelise it, export it.

What reads options is loaded when first used: a model made elsewhere is parallelised without the packages of the
command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mtraining.model.allocator import use_expandable_segments
from mtraining.model.anneal import Anneal
from mtraining.model.export import export_model
from mtraining.model.fixed_rope import fix_rope
from mtraining.model.indices import Refresh
from mtraining.model.loss import chunked_cross_entropy
from mtraining.model.parallel import ParallelLM, parallelize
from mtraining.model.support import check_supported

if TYPE_CHECKING:
    from mtraining.model.load import ModelOptions, build_model
    from mtraining.model.lora import LoraOptions
    from mtraining.model.rope import RopeOptions

__all__ = [
    "Anneal",
    "LoraOptions",
    "ModelOptions",
    "ParallelLM",
    "Refresh",
    "RopeOptions",
    "build_model",
    "check_supported",
    "chunked_cross_entropy",
    "export_model",
    "fix_rope",
    "parallelize",
    "use_expandable_segments",
]

_HOME = {"LoraOptions": "lora", "ModelOptions": "load", "RopeOptions": "rope", "build_model": "load"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mtraining.model' has no attribute {name!r}")
    return getattr(import_module(f"mtraining.model.{_HOME[name]}"), name)
