"""The Hugging Face side: build or load a model, parallelise it, export it.

Names are loaded when first used. A configuration is then read without transformers, which takes seconds to import, and
a model made elsewhere is parallelised without the packages of the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtraining.model.allocator import use_expandable_segments
    from mtraining.model.anneal import Anneal
    from mtraining.model.export import export_model
    from mtraining.model.fixed_rope import fix_rope
    from mtraining.model.indices import Refresh
    from mtraining.model.load import build_model
    from mtraining.model.loss import chunked_cross_entropy
    from mtraining.model.options import LoraOptions, ModelOptions, RopeOptions
    from mtraining.model.parallel import ParallelLM, parallelize
    from mtraining.model.support import check_supported

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

_HOME = {
    "Anneal": "anneal",
    "LoraOptions": "options",
    "ModelOptions": "options",
    "ParallelLM": "parallel",
    "Refresh": "indices",
    "RopeOptions": "options",
    "build_model": "load",
    "check_supported": "support",
    "chunked_cross_entropy": "loss",
    "export_model": "export",
    "fix_rope": "fixed_rope",
    "parallelize": "parallel",
    "use_expandable_segments": "allocator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mtraining.model' has no attribute {name!r}")
    value = getattr(import_module(f"mtraining.model.{_HOME[name]}"), name)
    globals()[name] = value
    return value
