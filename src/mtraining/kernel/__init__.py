"""Attention over a given sparse index: tensors only, no process groups, no models."""

from mtraining.kernel.backend import AttentionKernels, Backend, Decode, EstimationKernels, ProbeScope
from mtraining.kernel.choice import select_backend, select_decode
from mtraining.kernel.index import SparseIndex, dense_index, joined_where_alike, pack_blocks
from mtraining.kernel.placement import Placement
from mtraining.kernel.reference.attention import ReferenceBackend, merge
from mtraining.kernel.starts import Chunks, Window, check_starts_kernel, first_keys, reach_of

__all__ = [
    "AttentionKernels",
    "Backend",
    "Chunks",
    "Decode",
    "EstimationKernels",
    "Placement",
    "ProbeScope",
    "ReferenceBackend",
    "SparseIndex",
    "Window",
    "check_starts_kernel",
    "dense_index",
    "first_keys",
    "joined_where_alike",
    "merge",
    "pack_blocks",
    "reach_of",
    "select_backend",
    "select_decode",
]
