"""Which kernels a run compiles does not depend on its data: later steps find every one compiled by the first.

Triton compiles a kernel once for each set of constants and of types and alignments of its arguments. Here kernels run
in the interpreter, and for each launch the set is computed as a GPU's launch would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from mtraining.kernel.starts import document_starts
from mtraining.layout import build_layout
from mtraining.model.anneal import Anneal
from mtraining.pattern import Pattern, VerticalSlash, build_pattern
from mtraining.ring import sparse_ring_attention

SEQ_LEN, SIZE, HEADS, KV_HEADS, DIM = 256, 32, 2, 1, 32
_MADE: dict[Any, tuple[Any, dict[Any, str]]] = {}


class Launches:
    """Launches by kernel: the sets of what Triton compiles in."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    def take(self) -> set[tuple[str, str]]:
        """Since the last call."""
        seen, self.seen = self.seen, set()
        return seen

    def add(self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if kernel.fn not in _MADE:
            made: Any = JITFunction(kernel.fn, **kernel.kwargs)
            backend = CUDABackend(GPUTarget("cuda", 90, 32))
            _MADE[kernel.fn] = create_function_from_signature(made.signature, made.params, backend), {}
        bind, keys = _MADE[kernel.fn]
        _, specialization, launch = bind(*args, **options)
        name = f"{kernel.fn.__module__.removeprefix('mtraining.kernel.triton.')}.{kernel.__name__}"
        self.seen.add((name, compute_cache_key(keys, specialization, launch)))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    found, plain = Launches(), InterpretedFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found.add(kernel, args, options)
        return plain(kernel, *args, grid=grid, warmup=warmup, **options)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    return found


def tensors(seed: int, sharpness: float) -> list[Tensor]:
    """q, k, v, dout; the sharper, the fewer keys hold the mass."""
    made = torch.Generator().manual_seed(seed)
    shapes = [HEADS, KV_HEADS, KV_HEADS, HEADS]
    q, k, v, dout = (torch.randn(1, SEQ_LEN, heads, DIM, generator=made) for heads in shapes)
    return [q * sharpness, k, v, dout]


def step(pattern: Pattern, seed: int, sharpness: float, starts: Tensor | None = None) -> None:
    """Forward and backward of one layer, estimate included."""
    q, k, v, dout = tensors(seed, sharpness)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sparse_ring_attention(
        *leaves,
        pattern=pattern,
        layout=build_layout("striped", SIZE),
        mesh=None,
        kernel="triton",
        starts=starts,
    )
    out.backward(dout)


DOCUMENTS = ((0,), (100,), (7, 15, 24), tuple(range(0, 256, 32)))
STEPS = ((0, 0.1), (1, 1.0), (2, 8.0), (3, 30.0))
PATTERNS: dict[str, Pattern] = {
    "vertical_slash": VerticalSlash(
        SIZE, top_p=0.6, max_columns=40, max_slashes=90, window=8, sinks=3, probe=16
    ),
    "by block": VerticalSlash(
        SIZE, top_p=0.6, max_columns=33, slash_by="block", slash_density=0.4, probe_at="spread", probe=16, window=8,
        sinks=3,
    ),
    "xattention": build_pattern("xattention", block_size=SIZE, stride=8),
    "moba": build_pattern("moba", block_size=SIZE, top_k=3),
    "flexprefill": build_pattern("flexprefill", block_size=SIZE),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_later_steps_compile_nothing(name: str, launches: Launches) -> None:
    first, *others = STEPS
    step(PATTERNS[name], *first)
    compiled = launches.take()
    assert len(compiled) > 5
    for seed, sharpness in others:
        step(PATTERNS[name], seed, sharpness)
        assert launches.take() - compiled == set()


@pytest.mark.parametrize("name", PATTERNS)
def test_nor_do_other_documents(name: str, launches: Launches) -> None:
    compiled: set[tuple[str, str]] = set()
    for (seed, sharpness), begins in zip(STEPS, DOCUMENTS, strict=True):
        step(PATTERNS[name], seed, sharpness, document_starts(torch.tensor(begins), SEQ_LEN))
        found = launches.take()
        compiled = compiled or found
        assert found - compiled == set()


@pytest.mark.parametrize("columns", [40, 128])
def test_nor_do_budgets_that_shrink(columns: int, launches: Launches) -> None:
    anneal, compiled = Anneal(widen=2.0, widen_steps=3), set[tuple[str, str]]()
    pattern = replace(PATTERNS["vertical_slash"], max_columns=columns, max_slashes=64)
    widths = set()
    for (seed, sharpness), number in zip(STEPS, range(1, 5), strict=True):
        widened = anneal.pattern(pattern, number)
        widths.add((widened.max_columns, widened.max_slashes))
        step(widened, seed, sharpness)
        found = launches.take()
        compiled = compiled or found
        assert found - compiled == set()
    assert len(widths) == 4
