"""Attention sinks equal an eager softmax with one more logit: out, lse and every gradient, on every ring."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_ring_parity import peaked_inputs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mtraining
from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.pattern import build_pattern
from mtraining.ring import IndexTape, Observer, Ring, with_sinks
from pattern_cases import SIZE

SHAPE = (2, 64, 4, 2, 16)
PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "vertical_slash": {"top_p": 0.6, "max_columns": 11, "max_slashes": 5, "sinks": 3, "window": 5},
    "moba": {"chunk": 16, "top_k": 2},
}
# One far above every score, one far below, and two that matter.
SINKS = (30.0, -30.0, 0.7, 2.5)


def sinks() -> Tensor:
    return torch.tensor(SINKS, dtype=torch.float64, requires_grad=True)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> Tensor:
    """A softmax over a row's scores and its head's sink, of which the sink's share is dropped."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(
        ~mask, -torch.inf
    )
    sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return (torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ values).transpose(1, 2)


def job(worker: Worker, name: str, topology: tuple[int, ...], recompute: str | None) -> tuple[Any, ...]:
    """This rank's [out, dq, dk, dv], its share of the sinks' gradient, the index, and its rank."""
    mesh = worker.ring_mesh(topology)
    layout, rank = build_layout("striped", SIZE), Ring.over(mesh).rank
    q, k, v, dout = (layout.shard(x, rank, worker.world) for x in peaked_inputs({"seed": 5, "shape": SHAPE}))
    learned = sinks()
    for x in (q, k, v):
        x.requires_grad_()
    pattern, indices = build_pattern(name, block_size=SIZE, **PATTERNS[name]), []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, index = mtraining.sparse_ring_attention(
            q, k, v, pattern=pattern, layout=layout, mesh=mesh, return_index=True, sinks=learned
        )
        indices.append(index)
        return out

    if recompute is None:
        out = attention(q, k, v)
    else:
        tape = IndexTape(keep_outputs=recompute == "keep_attention")
        out = checkpoint(
            attention, q, k, v, use_reentrant=False, context_fn=lambda: (tape.record(), tape.replay())
        )
    out.backward(dout)
    return [x.detach() for x in (out, q.grad, k.grad, v.grad)], learned.grad, indices[0], rank  # type: ignore[union-attr]


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("topology", "recompute"), [((1,), None), ((2,), "full"), ((2, 2), "keep_attention")], ids=str
)
def test_equals_a_softmax_with_one_more_logit(
    pool: ProcessPool, name: str, topology: tuple[int, ...], recompute: str | None
) -> None:
    results = pool.run(job, world=math.prod(topology), name=name, topology=topology, recompute=recompute)
    results.sort(key=lambda result: result[-1])
    ours = [build_layout("striped", SIZE).unshard([tensors[i] for tensors, *_ in results]) for i in range(4)]
    shares = torch.stack([share for _, share, *_ in results])
    q, k, v, dout = peaked_inputs({"seed": 5, "shape": SHAPE})
    learned = sinks()
    for x in (q, k, v):
        x.requires_grad_()
    mask = results[0][2].to_mask()
    assert name == "dense" or mask.sum() < 0.9 * mask[..., 0].numel() * (SHAPE[1] + 1) / 2
    expected = eager(q, k, v, mask, learned)
    expected.backward(dout)
    for got, want in zip(ours, (expected, q.grad, k.grad, v.grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(shares.sum(0), learned.grad, rtol=1e-10, atol=1e-12)
    assert learned.grad is not None and learned.grad[2:].abs().min() > 0.01


def test_rows_without_keys_and_extreme_sinks_stay_finite() -> None:
    lse = torch.tensor([-torch.inf, 0.0, 800.0], dtype=torch.float64).expand(1, 3, 3)
    out = torch.ones(1, 3, 3, 2, dtype=torch.float64)
    out[:, 0] = 0
    extreme = torch.tensor([-900.0, 0.0, 900.0], dtype=torch.bfloat16)
    scaled, joined = with_sinks(out.clone(), lse, extreme)
    assert scaled.isfinite().all() and joined.isfinite().all()
    assert torch.equal(joined[0, :, 0], extreme.double())  # the sink alone
    assert torch.equal(scaled[:, 0], out[:, 0])
    torch.testing.assert_close(scaled[0, 1, :, 0], torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))


def test_recall_is_of_the_keys_alone() -> None:
    """A sink takes mass from all keys alike, and a dense pattern keeps all of theirs."""
    q, k, v, _ = peaked_inputs({"seed": 5, "shape": SHAPE})
    with Observer(recall_rows=16) as seen:
        mtraining.sparse_ring_attention(
            q,
            k,
            v,
            pattern=build_pattern("dense", block_size=SIZE),
            layout="contiguous",
            mesh=None,
            sinks=sinks(),
        )
    assert seen.stats[0].recall == pytest.approx(1.0)


def test_one_sink_for_each_head() -> None:
    q, k, v, _ = peaked_inputs({"seed": 5, "shape": SHAPE})
    with pytest.raises(
        UserError, match=r"sinks: shape \(3,\) does not fit q .*one number for each query head"
    ):
        mtraining.sparse_ring_attention(
            q, k, v, pattern="dense", layout="contiguous", mesh=None, sinks=torch.zeros(3)
        )
