"""Attention over a given sparse index: tensors only, no process groups, no models."""

from mtraining.kernel.backend import Backend, Decode
from mtraining.kernel.choice import select_backend, select_decode
from mtraining.kernel.index import SparseIndex, dense_index, pack_blocks
from mtraining.kernel.placement import Placement
from mtraining.kernel.reference.attention import ReferenceBackend, merge

__all__ = [
    "Backend",
    "Decode",
    "Placement",
    "ReferenceBackend",
    "SparseIndex",
    "dense_index",
    "merge",
    "pack_blocks",
    "select_backend",
    "select_decode",
]
