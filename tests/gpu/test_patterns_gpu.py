"""Patterns on a GPU: they agree with the CPU, wait for nothing, and feed the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mtraining import sparse_ring_attention
from mtraining.kernel import select_backend
from mtraining.pattern import SequenceShard, build_pattern

pytestmark = pytest.mark.gpu

PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "vertical_slash": ("vertical_slash", {"top_p": None, "top_k_columns": 200, "top_k_slashes": 110}),
    "a_shape": ("a_shape", {"sinks": 40, "window": 300}),
    "moba": ("moba", {"chunk": 256, "top_k": 3}),
    "xattention": ("xattention", {"threshold": 0.5}),
    "flexprefill, query-aware": ("flexprefill", {"gamma": 0.5, "tau": 9.0}),
    "flexprefill, vertical-slash": ("flexprefill", {"gamma": 0.04, "tau": 0.0, "max_columns": 256}),
    "union": (
        "union",
        {
            "patterns": [
                {"name": "moba", "options": {"chunk": 256, "top_k": 2}},
                {"name": "a_shape", "options": {"sinks": 40, "window": 300}},
            ]
        },
    ),
}
TOKENS = 4096


def inputs(dtype: torch.dtype) -> list[Tensor]:
    q = torch.randn(1, TOKENS, 4, 128)
    k, v = (torch.randn(1, TOKENS, 2, 128) for _ in range(2))
    k[:, ::37] *= 2
    return [x.to("cuda", dtype) for x in (q, k, v)]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Back to normal after the test, however it ends."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_agrees_with_the_cpu_and_waits_for_nothing(name: str) -> None:
    pattern = build_pattern(PATTERNS[name][0], **PATTERNS[name][1])
    q, k, _ = inputs(torch.bfloat16)
    shard = SequenceShard.whole(TOKENS, "cuda")
    shard = SequenceShard(shard.all_positions, shard.comm, select_backend("triton", q.device, q.dtype, 128))
    pattern.estimate(q, k, shard, 0.1)  # compiled now
    torch.cuda.set_sync_debug_mode("error")
    index = pattern.estimate(q, k, shard, 0.1)
    torch.cuda.set_sync_debug_mode("default")
    mask = index.to_mask().cpu()
    expected = pattern.estimate(q.cpu().float(), k.cpu().float(), SequenceShard.whole(TOKENS), 0.1).to_mask()
    assert 0 < expected.double().mean() < 0.45  # of a causal half
    assert (mask != expected).double().mean() < 0.01, "only choices near a threshold may fall differently"


@pytest.mark.parametrize("name", PATTERNS)
def test_triton_attention_over_its_index_equals_the_mask(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(torch.bfloat16))
    pattern = build_pattern(PATTERNS[name][0], **PATTERNS[name][1])
    out, index = sparse_ring_attention(
        q, k, v, pattern=pattern, layout="contiguous", mesh=None, return_index=True, kernel="triton"
    )
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(2, 2).transpose(1, 2) for x in exact[1:])
    scores = (exact[0].transpose(1, 2) @ keys.transpose(-1, -2) * 128**-0.5).masked_fill(
        ~index.to_mask(), -torch.inf
    )
    truth = (scores.softmax(-1) @ values).transpose(1, 2)
    for got, want in zip(
        (out, *grads), (truth, *torch.autograd.grad(truth, exact, dout.float())), strict=True
    ):
        assert (got - want).norm() <= 1e-2 * want.norm()
