"""Attention sinks on a GPU against an eager softmax with one more logit, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtraining
from mtraining.pattern import build_pattern

pytestmark = pytest.mark.gpu

TOKENS, HEADS, KV_HEADS, DIM = 2048, 8, 2, 128
PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "vertical_slash": {"top_p": 0.6, "max_columns": 200, "max_slashes": 5, "slash_by": "block"},
    "moba": {"chunk": 256, "top_k": 3},
}


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ keys.transpose(-1, -2) * DIM**-0.5).masked_fill(~mask, -torch.inf)
    sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return (torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ values).transpose(1, 2)


@pytest.mark.parametrize("kernel", ["triton", "auto"])
@pytest.mark.parametrize("name", PATTERNS)
def test_sinks_and_their_gradient(name: str, kernel: str) -> None:
    torch.manual_seed(0)
    shapes = [(1, TOKENS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, dout = (torch.randn(shape, device="cuda").to(torch.bfloat16) for shape in shapes)
    sinks = torch.linspace(-2, 6, HEADS, device="cuda").to(torch.bfloat16)
    inputs = [x.clone().requires_grad_() for x in (q, k, v, sinks)]
    out, index = mtraining.sparse_ring_attention(
        *inputs[:3], pattern=build_pattern(name, block_size=128, **PATTERNS[name]), layout="contiguous", mesh=None,
        kernel=kernel, sinks=inputs[3], return_index=True,
    )  # fmt: skip
    found = [out.detach(), *torch.autograd.grad(out, inputs, dout)]
    exact = [x.double().requires_grad_() for x in (q, k, v, sinks)]
    expected = eager(*exact[:3], index.to_mask(), exact[3])
    wanted = [expected.detach(), *torch.autograd.grad(expected, exact, dout.double())]
    for part, got, want in zip(("out", "dq", "dk", "dv", "dsinks"), found, wanted, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < 8e-3, f"{part}: relative error {error:.1e}"
