"""A call whose index is given: what memory prediction runs, and what layer recompute replays."""

from __future__ import annotations

import pytest
import torch

from mtraining.kernel import SparseIndex
from mtraining.kernel.reference.attention import ReferenceBackend
from mtraining.kernel.reference.estimate import ReferenceEstimation
from mtraining.layout import build_layout
from mtraining.pattern import Pattern, SequenceShard, build_pattern
from mtraining.ring import IndexTape, Ring, sparse_ring_attention
from mtraining.ring import attention as ring_attention
from mtraining.ring.attention import PreparedCall, attend_backward, attend_prepared
from mtraining.ring.plan import make_plan

SIZE, TOKENS = 16, 64
PATTERN = build_pattern("vertical_slash", block_size=SIZE, top_p=0.5, sinks=2, window=4, probe=8)


def problem() -> tuple[list[torch.Tensor], SparseIndex, PreparedCall]:
    """q, k, v and dout, the index that the pattern chooses, and a call with that index."""
    tensors = [torch.randn(1, TOKENS, heads, 8, dtype=torch.float64) for heads in (4, 2, 2, 4)]
    plan = make_plan(Ring.over(None), build_layout("contiguous"), TOKENS, SIZE, torch.device("cpu"))
    backend, scale = ReferenceBackend(), 8**-0.5
    index = PATTERN.estimate(tensors[0], tensors[1], plan.shard(backend), scale)
    return tensors, index, PreparedCall(plan, backend, index, scale)


def test_equals_attention_that_estimates_the_same_index() -> None:
    (q, k, v, dout), _, call = problem()
    out, lse, used = attend_prepared(q, k, v, lambda index: call)
    *gradients, of_sinks = attend_backward(dout, q, k, v, out, lse, used)
    assert of_sinks is None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    whole = sparse_ring_attention(
        *leaves, pattern=PATTERN, layout="contiguous", mesh=None, kernel="reference"
    )
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    for mine, true in zip(gradients, torch.autograd.grad(whole, leaves, dout), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep_outputs", [False, True])
def test_a_replay_is_given_the_index_of_the_first_pass(
    keep_outputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (q, k, v, _), index, call = problem()
    given: list[SparseIndex | None] = []
    turns, seen = [], []
    turn = ring_attention.ring_forward
    monkeypatch.setattr(ring_attention, "ring_forward", lambda *a: turns.append(1) or turn(*a))

    def prepare(recorded: SparseIndex | None) -> PreparedCall:
        given.append(recorded)
        return call

    tape = IndexTape(keep_outputs)
    with tape.record():
        first = attend_prepared(q, k, v, prepare, lambda lse, index: seen.append(index))
    with tape.replay():
        again = attend_prepared(q, k, v, prepare, lambda lse, index: seen.append(index))
    assert given == [None, index]
    assert seen == [index]
    assert len(turns) == (1 if keep_outputs else 2)
    for a, b in zip(first[:2], again[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "pattern",
    [PATTERN, build_pattern("flexprefill", block_size=SIZE), build_pattern("xattention", block_size=SIZE),
     build_pattern("moba", block_size=SIZE), build_pattern("a_shape", block_size=SIZE)],
    ids=lambda pattern: pattern.name,
)  # fmt: skip
def test_a_pattern_needs_estimation_kernels_only(pattern: Pattern) -> None:
    estimation = ReferenceEstimation()
    assert not hasattr(estimation, "tiles_forward") and not hasattr(estimation, "gather_columns")
    shard = SequenceShard(torch.arange(TOKENS)[None], backend=estimation)
    q, k = torch.randn(1, TOKENS, 4, 8), torch.randn(1, TOKENS, 2, 8)
    assert pattern.estimate(q, k, shard, 8**-0.5).density().min() > 0
