"""The Hugging Face side: build or load a model, parallelise it, export it."""

from mtraining.model.export import export_model
from mtraining.model.indices import Refresh
from mtraining.model.load import ModelOptions, build_model
from mtraining.model.loss import chunked_cross_entropy
from mtraining.model.parallel import ParallelLM, parallelize
from mtraining.model.rope import RopeOptions
from mtraining.model.support import check_supported

__all__ = [
    "ModelOptions",
    "ParallelLM",
    "Refresh",
    "RopeOptions",
    "build_model",
    "check_supported",
    "chunked_cross_entropy",
    "export_model",
    "parallelize",
]
