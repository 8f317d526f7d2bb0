"""Small options of every estimated pattern, for tests that hold for all of them: blocks of 8, 64 tokens or more; and a
pattern that counts its estimates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mtraining.kernel import SparseIndex
from mtraining.pattern import Pattern, SequenceShard, VerticalSlash, build_pattern

SIZE = 8

# name of the case -> (pattern, options); something is left out by each of them at 128 tokens
SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "a_shape": ("a_shape", {"sinks": 3, "window": 20}),
    "moba": ("moba", {"chunk": 16, "top_k": 3}),
    "xattention": ("xattention", {"stride": 4, "threshold": 0.5}),
    "xattention, refined": ("xattention", {"stride": 4, "threshold": 0.7, "refine": 3}),
    "flexprefill": ("flexprefill", {"gamma": 0.5, "tau": 0.2, "max_columns": 20}),
    "flexprefill, refined": ("flexprefill", {"gamma": 0.6, "tau": 9.0, "refine": 3}),
    "union": (
        "union",
        {
            "patterns": [
                {"name": "toeplitz_random", "options": {"density": 0.3, "window": 1, "columns": 6}},
                {"name": "moba", "options": {"chunk": 16, "top_k": 2}},
                {"name": "a_shape", "options": {"sinks": 2, "window": 9}},
            ]
        },
    ),
}

# a budget that leaves nothing out
FULL: dict[str, tuple[str, dict[str, Any]]] = {
    "a_shape": ("a_shape", {"sinks": 0, "window": 10**6}),
    "moba": ("moba", {"chunk": 16, "top_k": 99}),
    "xattention": ("xattention", {"stride": 4, "threshold": 1}),
    "xattention, refined": ("xattention", {"stride": 4, "threshold": 1, "refine": 99}),
    "flexprefill, query-aware": ("flexprefill", {"gamma": 1.0, "tau": 9.0}),
    "flexprefill, refined": ("flexprefill", {"gamma": 1.0, "tau": 9.0, "refine": 99}),
    "flexprefill, vertical-slash": ("flexprefill", {"gamma": 1.0, "tau": 0.0}),
    "union": ("union", {"patterns": [{"name": "a_shape", "options": {"window": 1}}, "dense"]}),
}


def build_case(case: tuple[str, dict[str, Any]]) -> Pattern:
    name, options = case
    return build_pattern(name, block_size=SIZE, **options)


@dataclass(frozen=True)
class Counting(VerticalSlash):
    """Counts its estimates."""

    calls: list[int] = field(default_factory=list)

    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        self.calls.append(1)
        return super().estimate(q, k, shard, scale)
