"""Packed documents on a GPU: nothing leaks by a bit, nothing waits, and the choice is the CPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from library_warnings import SYNC_CHECKS
from mtraining import sparse_ring_attention
from mtraining.kernel import select_backend
from mtraining.pattern import Pattern, PerHead, SequenceShard, build_pattern

pytestmark = pytest.mark.gpu

TOKENS = 4096
FIXED = {"top_p": None, "top_k_columns": 200, "top_k_slashes": 150}
PATTERNS: dict[str, tuple[str, dict[str, Any]]] = {
    "top_k": ("vertical_slash", FIXED),
    "top_p": ("vertical_slash", {"top_p": 0.5, "max_columns": 400, "max_slashes": 300}),
    "by block": (
        "vertical_slash",
        {"top_p": None, "top_k_columns": 200, "slash_by": "block", "slash_density": 0.3, "probe": 128}
        | {"probe_at": "spread"},
    ),
    "a_shape": ("a_shape", {"sinks": 40, "window": 300}),
    "moba": ("moba", {"chunk": 256, "top_k": 3}),
    "xattention": ("xattention", {"threshold": 0.5}),
    "flexprefill": ("flexprefill", {"gamma": 0.5, "tau": 0.2, "max_columns": 256}),
    "xattention, refined": ("xattention", {"threshold": 0.5, "refine": 3}),
    "flexprefill, refined": ("flexprefill", {"gamma": 0.5, "tau": 9.0, "refine": 3}),
    "union": ("union", {"patterns": [{"name": "vertical_slash", "options": FIXED}, "moba"]}),
    "toeplitz_random": ("toeplitz_random", {"density": 0.2, "window": 1, "columns": 100}),
    "dense": ("dense", {}),
}
PACKED = {
    "at blocks": [1024, 256, 1792, 128, 896],
    "anywhere": [1000, 3, 77, 1700, 50, 1266],
}


def pattern_of(name: str) -> Pattern:
    if name == "per_head":
        return PerHead(heads=tuple(pattern_of(one) for one in ("top_k", "by block", "moba", "top_p")))
    return build_pattern(PATTERNS[name][0], **PATTERNS[name][1])


def starts_of(lengths: list[int]) -> Tensor:
    ends = torch.tensor(lengths).cumsum(0)
    return (ends - torch.tensor(lengths)).repeat_interleave(torch.tensor(lengths)).int()[None].cuda()


def inputs(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and dout."""
    made = torch.Generator("cuda").manual_seed(seed)
    tensors = [
        torch.randn(1, TOKENS, heads, 128, generator=made, device="cuda", dtype=dtype)
        for heads in (4, 2, 2, 4)
    ]
    tensors[1][:, ::37] *= 2
    return tensors


def results(name: str, layout: str, starts: Tensor, given: list[Tensor]) -> list[Tensor]:
    """out, dq, dk and dv."""
    q, k, v = (x.clone().requires_grad_() for x in given[:3])
    out = sparse_ring_attention(
        q, k, v, pattern=pattern_of(name), layout=layout, mesh=None, starts=starts, kernel="triton"
    )
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), given[3])]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", [*PATTERNS, "per_head"])
def test_a_document_changes_no_bit_of_another(name: str, packed: str) -> None:
    starts = starts_of(PACKED[packed])
    plain, other = inputs(0), inputs(1)
    before = results(name, "striped", starts, plain)
    for first in starts.unique().tolist():
        mine = (starts == first)[..., None, None]
        after = results(
            name, "striped", starts, [torch.where(mine, 2 * b, a) for a, b in zip(plain, other, strict=True)]
        )
        for what, a, b in zip(("out", "dq", "dk", "dv"), before, after, strict=True):
            changed = (a != b).flatten(2).any(-1)
            assert changed[mine[..., 0, 0]].any()
            assert not (changed & ~mine[..., 0, 0]).any(), f"{what} changed with the document at {first}"


@pytest.mark.parametrize("name", [*PATTERNS, "per_head"])
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings(SYNC_CHECKS)
def test_agrees_with_the_cpu_and_waits_for_nothing(name: str) -> None:
    pattern, starts = pattern_of(name), starts_of(PACKED["anywhere"])
    q, k, *_ = inputs()
    backend = select_backend("triton", q.device, q.dtype, 128)
    base = SequenceShard(torch.arange(TOKENS, device="cuda")[None], backend=backend)
    pattern.estimate(q, k, base.of_batch(starts=starts), 0.1)  # compiles, and makes what is kept
    again = starts.clone()  # another batch: its tables are made anew
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    index = pattern.estimate(q, k, base.of_batch(starts=again), 0.1)
    torch.cuda.set_sync_debug_mode("default")
    shard = SequenceShard.whole(TOKENS).of_batch(starts=starts.cpu())
    expected = pattern.estimate(q.cpu().float(), k.cpu().float(), shard, 0.1).to_mask()
    seen = (torch.arange(TOKENS) >= starts.cpu()[..., None])[:, None]
    different = ((index.to_mask().cpu() != expected) & seen).double().sum() / (expected & seen).double().sum()
    assert different < 0.03, "only choices near a threshold may fall differently"


@pytest.mark.parametrize("name", [*PATTERNS, "per_head"])
def test_same_bits_twice(name: str) -> None:
    starts, given = starts_of(PACKED["anywhere"]), inputs()
    first, second = (results(name, "zigzag", starts, given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(x.isfinite().all() for x in first)


@pytest.mark.parametrize("name", ["top_k", "by block"])
def test_one_document_chooses_what_a_sequence_does(name: str) -> None:
    q, k, *_ = inputs()
    backend = select_backend("triton", q.device, q.dtype, 128)
    base = SequenceShard(torch.arange(TOKENS, device="cuda")[None], backend=backend)
    plain = pattern_of(name).estimate(q, k, base, 0.1).to_mask()
    one = base.of_batch(starts=torch.zeros(1, TOKENS, dtype=torch.int32, device="cuda"))
    assert (pattern_of(name).estimate(q, k, one, 0.1).to_mask() != plain).double().mean() < 0.001
