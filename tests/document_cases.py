"""Packed sequences of 128 tokens in blocks of 8, and a small pattern of every kind for them."""

from __future__ import annotations

from typing import Any

from mtraining.pattern import Pattern, PerHead
from pattern_cases import SIZE, SPARSE, build_case
from starts_cases import of_documents

TOKENS, SCALE = 128, 0.25
BUDGET: dict[str, Any] = {"probe": 16, "sinks": 3, "window": 4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **SPARSE,
    "dense": ("dense", {}),
    "toeplitz_random": ("toeplitz_random", {"density": 0.3, "window": 1, "columns": 6}),
    "flexprefill, vertical-slash": ("flexprefill", {"gamma": 0.5, "tau": 0.0, "max_columns": 40}),
    "flexprefill, query-aware": ("flexprefill", {"gamma": 0.5, "tau": 9.0}),
    "top_p": ("vertical_slash", {**BUDGET, "top_p": 0.5, "max_columns": 14, "max_slashes": 12}),
    "top_k": ("vertical_slash", {**BUDGET, "top_p": None, "top_k_columns": 12, "top_k_slashes": 7}),
    "spread": ("vertical_slash", {**BUDGET, "top_p": 0.6, "probe_at": "spread", "max_columns": 20}),
    "by block": (
        "vertical_slash",
        {**BUDGET, "top_p": None, "top_k_columns": 12, "slash_by": "block", "slash_density": 0.4, "probe_at": "mixed"},
    ),
    "by block, top_p": (
        "vertical_slash",
        {**BUDGET, "top_p": 0.5, "max_columns": 12, "slash_by": "block", "slash_density": 0.6, "probe_at": "spread"},
    ),
}  # fmt: skip
NAMES = [*CASES, "per_head"]

# Two sequences each; several documents in one block, boundaries on blocks and off them, one document alone.
PACKED = {
    "at blocks": of_documents([32, 8, 64, 24], [8, 8, 8, 104]),
    "anywhere": of_documents([31, 2, 70, 25], [3, 2, 1, 1, 50, 71]),
    "tiny": of_documents([1, 1, 1, 45, 1, 78, 1], [2, 10, 3, 4, 11, 40, 58]),
    "one": of_documents([128], [61, 67]),
}


def pattern_of(name: str) -> Pattern:
    if name != "per_head":
        return build_case(CASES[name])
    return PerHead(SIZE, tuple(build_case(CASES[one]) for one in ("top_k", "moba", "by block", "top_p")))
