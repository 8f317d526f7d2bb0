"""Patterns on a GPU: they agree with the CPU, wait for nothing, and feed the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from library_warnings import SYNC_CHECKS
from mtraining import sparse_ring_attention
from mtraining.kernel import select_backend
from mtraining.kernel.reference.estimate import ReferenceEstimation
from mtraining.pattern import SequenceShard, build_pattern
from mtraining.pattern.probe import probe_positions

pytestmark = pytest.mark.gpu

PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "vertical_slash": ("vertical_slash", {"top_p": None, "top_k_columns": 200, "top_k_slashes": 110}),
    "vertical_slash, spread, by block": (
        "vertical_slash",
        {"top_p": None, "top_k_columns": 200, "slash_by": "block", "slash_density": 0.2}
        | {"probe": 250, "probe_at": "spread"},
    ),
    "a_shape": ("a_shape", {"sinks": 40, "window": 300}),
    "moba": ("moba", {"chunk": 256, "top_k": 3}),
    "xattention": ("xattention", {"threshold": 0.5}),
    "flexprefill, query-aware": ("flexprefill", {"gamma": 0.5, "tau": 9.0}),
    "flexprefill, vertical-slash": ("flexprefill", {"gamma": 0.04, "tau": 0.0, "max_columns": 256}),
    "xattention, refined": ("xattention", {"threshold": 0.5, "refine": 3}),
    "flexprefill, refined": ("flexprefill", {"gamma": 0.5, "tau": 9.0, "refine": 3}),
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


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings(SYNC_CHECKS)
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


@pytest.mark.parametrize("positions", ["all", "striped", "scattered"])
@pytest.mark.parametrize("size", [1, 64, 128])
@pytest.mark.parametrize("at", ["last", "spread"])
def test_probe_masses_equal_the_reference(at: str, size: int, positions: str) -> None:
    q, k, _ = inputs(torch.bfloat16)
    everywhere = torch.arange(TOKENS, device="cuda")
    places = {
        "all": everywhere,
        "striped": everywhere.view(-1, 2, 128)[:, 1].flatten(),
        "scattered": everywhere[torch.randperm(TOKENS, device="cuda")[:1000]],
    }[positions]
    where = probe_positions(250, at, TOKENS, q.device)
    probe, keys, backend = q[:, where], k[:, places], select_backend("triton", q.device, q.dtype, 128)
    truth, given = ReferenceEstimation(), (probe.double(), keys.double(), where, places, 0.1)
    torch.testing.assert_close(
        backend.probe_lse(probe, keys, where, places, 0.1).double(),
        truth.probe_lse(*given),
        rtol=1e-5,
        atol=1e-5,
    )
    exact_lse = truth.probe_lse(probe.double(), k.double(), where, everywhere, 0.1)
    lse = exact_lse.float()
    first, again = (backend.probe_mass(probe, keys, where, places, 0.1, lse, TOKENS, size) for _ in range(2))
    wanted = truth.probe_mass(*given, exact_lse, TOKENS, size)
    for ours, same, exact in zip(first, again, wanted, strict=True):
        assert torch.equal(ours, same)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


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
