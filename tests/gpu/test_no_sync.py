"""The whole of sparse ring attention on a GPU: nothing waits for the device, and the same bits come out twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from library_warnings import LEAF_GRADIENTS, SYNC_CHECKS
from mtraining.kernel.starts import document_starts
from mtraining.layout import build_layout
from mtraining.pattern import Pattern, VerticalSlash, build_pattern
from mtraining.pattern.per_head import PerHead
from mtraining.ring import AttentionRuntime, IndexTape, sparse_ring_attention

pytestmark = pytest.mark.gpu

FIXED = VerticalSlash(top_p=None, top_k_columns=300, top_k_slashes=200)
MASS = VerticalSlash(top_p=0.7, max_columns=1000, max_slashes=500)
BLOCKS = VerticalSlash(top_p=None, top_k_columns=300, slash_by="block", slash_density=0.2, probe_at="mixed")
PATTERNS: dict[str, Pattern] = {
    "top_p": MASS,
    "top_k": FIXED,
    "top_k, slashes by block": BLOCKS,
    "no columns": VerticalSlash(top_p=None, top_k_columns=0, top_k_slashes=200, sinks=0),
    "every head its own budget": PerHead(heads=(MASS, FIXED) * 4),
    "heads of different kinds": PerHead(heads=(MASS, BLOCKS, build_pattern("a_shape"), FIXED) * 2),
    "dense": build_pattern("dense"),
}


def inputs() -> list[Tensor]:
    """q, k, v, dout; some keys are loud, so that there is something to find."""
    made = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(1, 4096, heads, 128, generator=made, device="cuda", dtype=torch.bfloat16)
        for heads in (8, 2, 2, 8)
    ]
    tensors[1][:, ::41] *= 2
    return [x.requires_grad_(place < 3) for place, x in enumerate(tensors)]


def attend(
    pattern: Pattern, layout: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **bounds: Any
) -> list[Tensor]:
    """out, dq, dk, dv."""
    out = sparse_ring_attention(q, k, v, pattern=pattern, layout=layout, mesh=None, kernel="triton", **bounds)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("layout", ["striped", "zigzag"])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings(SYNC_CHECKS)
def test_nothing_waits_for_the_device_from_q_to_gradients(name: str, layout: str) -> None:
    tensors = inputs()
    attend(PATTERNS[name], layout, *tensors)  # compiles, and makes what is kept for every later call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    attend(PATTERNS[name], layout, *tensors)


@pytest.mark.parametrize("name", ["top_p", "dense"])
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings(SYNC_CHECKS)
def test_nothing_waits_with_documents_and_a_window(name: str) -> None:
    tensors = inputs()
    batches = [document_starts(torch.tensor(begins).cuda(), 4096) for begins in ([700, 701, 3000], [5, 1024])]
    attend(PATTERNS[name], "striped", *tensors, starts=batches[0], window=900)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    attend(PATTERNS[name], "striped", *tensors, starts=batches[1], window=900)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings(SYNC_CHECKS)
def test_the_check_sees_a_wait() -> None:
    x = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@pytest.mark.parametrize("name", PATTERNS)
def test_same_bits_twice(name: str) -> None:
    tensors = inputs()
    first, second = (attend(PATTERNS[name], "striped", *tensors) for _ in range(2))
    equal = {
        what: torch.equal(a, b) for what, a, b in zip(("out", "dq", "dk", "dv"), first, second, strict=True)
    }
    assert all(equal.values()), equal
    assert all(x.isfinite().all() and x.any() for x in first)


def test_replayed_index_gives_the_same_bits() -> None:
    q, k, v, dout = inputs()
    tape = IndexTape()
    with tape.record():
        first = attend(MASS, "striped", q, k, v, dout)
    with tape.replay():
        again = attend(MASS, "striped", q, k, v, dout)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings(SYNC_CHECKS, LEAF_GRADIENTS)
def test_compiled_attention_has_the_same_bits_and_waits_for_nothing() -> None:
    q, k, v, dout = inputs()
    runtime = AttentionRuntime(MASS, build_layout("striped"), None, "triton")

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return runtime(q, k, v) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        for mode in ("default", "error"):  # the first call compiles
            torch.cuda.set_sync_debug_mode(mode)
            out = call(q, k, v)
            grads = torch.autograd.grad(out, (q, k, v), dout)
            torch.cuda.set_sync_debug_mode("default")
        results.append([out.detach(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
