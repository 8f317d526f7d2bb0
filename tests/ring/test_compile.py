"""Attention inside torch.compile: operators that the compiler can trust, one graph, and the results of eager mode."""

from __future__ import annotations

import copy
import gc
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from library_warnings import LEAF_GRADIENTS
from mtraining.layout import build_layout
from mtraining.pattern import Pattern, VerticalSlash, build_pattern
from mtraining.ring import AttentionRuntime, IndexTape, Observer, attention, op

OPTIONS = {"block_size": 8, "top_p": 0.5, "max_columns": 9, "max_slashes": 9, "sinks": 2, "window": 3}
SHAPES = ("test_schema", "test_faketensor")


def runtime(pattern: Pattern | None = None) -> AttentionRuntime:
    return AttentionRuntime(pattern or VerticalSlash(**OPTIONS), build_layout("striped", 8), None)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(1, 64, heads, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


# torch.compile's own, in PyTorch 2.14.
@pytest.mark.filterwarnings(LEAF_GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_are_what_they_say(dtype: torch.dtype) -> None:
    """Schema, fake shapes, dtypes and strides, no aliasing, gradients registered, traceable with dynamic shapes."""
    attend, backward = torch.ops.mtraining.attend.default, torch.ops.mtraining.attend_backward.default
    made = runtime()
    q, k, v = inputs(dtype)
    opcheck(attend, (q, k, v, None, made.number, None))
    apart = [
        x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)
    ]  # as transformers has them
    opcheck(attend, (*apart, None, made.number, 0.3), test_utils=SHAPES)
    sinks = torch.randn(4, dtype=dtype, requires_grad=True)
    opcheck(attend, (q, k, v, sinks, made.number, None))
    for used in (None, sinks.detach()):
        saved = [x.detach() for x in (q, k, v, *attend(q, k, v, used, made.number, None))]
        call = op._recall(saved[4])
        with mock.patch.object(op, "_recall", return_value=call):  # opcheck passes copies
            opcheck(backward, (torch.randn_like(saved[3]), *saved, used), test_utils=SHAPES)


def test_layers_of_different_settings_share_one_graph() -> None:
    """A second pattern or layout does not compile anew, and each call attends with its own."""
    runtimes = [
        runtime(),
        AttentionRuntime(VerticalSlash(**OPTIONS | {"top_p": 0.2}), build_layout("contiguous"), None),
        runtime(build_pattern("moba", block_size=8, chunk=16, top_k=2)),
    ]
    runtimes.append(copy.deepcopy(runtimes[2]))
    x = torch.randn(1, 64, 4, 16, dtype=torch.float64)

    def layer(made: AttentionRuntime, x: Tensor) -> Tensor:
        return made(x.sin(), x[:, :, :2] * 1.5, x[:, :, 2:].cos(), 0.2).square()

    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    results = []
    for made in runtimes:
        pair = []
        for call in (layer, compiled):
            leaf = x.clone().requires_grad_()
            out = call(made, leaf)
            out.sum().backward()
            pair.append((out.detach(), leaf.grad))
        (out, grad), (compiled_out, compiled_grad) = pair
        assert torch.equal(compiled_out, out) and torch.equal(compiled_grad, grad)
        results.append(out)
    assert not any(torch.equal(results[0], other) for other in results[1:])
    assert torch.equal(results[2], results[3])
    assert compiler.frame_count == 1


def test_sinks_in_compiled_code() -> None:
    made = runtime()

    def layer(x: Tensor, sinks: Tensor) -> Tensor:
        return made(x.sin(), x[:, :, :2] * 1.5, x[:, :, 2:].cos(), 0.2, sinks).square()

    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        x = torch.randn(1, 64, 4, 16, dtype=torch.float64, requires_grad=True)
        sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
        out = call(x, sinks)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), (x, sinks))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2].abs().min() > 0


@pytest.mark.parametrize("keep_outputs", [False, True])
def test_tape_and_observer_work_around_compiled_code(keep_outputs: bool) -> None:
    made = runtime()

    def layer(x: Tensor) -> Tensor:
        return made(x, x[:, :, :2] * 1.5, x[:, :, 2:].sin()) + x

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        x = torch.linspace(-2, 2, 64 * 4 * 16, dtype=torch.float64).sin().view(1, 64, 4, 16).requires_grad_()
        tape = IndexTape(keep_outputs)
        with (
            Observer(recall_rows=16) as seen,
            mock.patch.object(
                VerticalSlash, "estimate", autospec=True, side_effect=VerticalSlash.estimate
            ) as estimate,
            mock.patch.object(attention, "ring_forward", side_effect=attention.ring_forward) as ring,
        ):
            out = checkpoint(
                call, x, use_reentrant=False, context_fn=lambda tape=tape: (tape.record(), tape.replay())
            )
            out.square().sum().backward()
        assert estimate.call_count == 1
        assert ring.call_count == (1 if keep_outputs else 2)
        results.append((out.detach(), x.grad, [(s.density, s.recall) for s in seen.stats]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2] and len(results[0][2]) == 1


def test_an_index_lives_as_long_as_what_backward_saved() -> None:
    q, k, v = inputs()
    made = runtime()
    out, lse = torch.ops.mtraining.attend(q, k, v, None, made.number, None)
    held = len(op._calls)
    for _ in range(3):
        torch.ops.mtraining.attend(q, k, v, None, made.number, None)
    assert len(op._calls) == held + 1  # the last one's, until the next call
    with pytest.raises(RuntimeError, match="given a copy of what its forward saved"):
        torch.ops.mtraining.attend_backward(out, q, k, v, out, lse.clone(), None)
    out.sum().backward()
    assert q.grad is not None


def test_a_runtime_that_is_gone_is_an_error() -> None:
    made = runtime()
    number = made.number
    del made
    gc.collect()
    with pytest.raises(RuntimeError, match="AttentionRuntime .* no longer exists"):
        torch.ops.mtraining.attend(*inputs(), None, number, None)
