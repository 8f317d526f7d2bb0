"""Sparse ring attention: the autograd function that joins pattern, layout, ring and kernel.

Read this file top to bottom for the whole forward and backward of one attention layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mtraining.errors import UserError
from mtraining.kernel import (
    AttentionKernels,
    Placement,
    SparseIndex,
    Window,
    check_starts_kernel,
    select_backend,
)
from mtraining.kernel.backend import Columns
from mtraining.layout import Layout, build_layout
from mtraining.pattern import Pattern, build_pattern
from mtraining.ring.observe import observe
from mtraining.ring.plan import RingPlan, make_plan
from mtraining.ring.schedule import GradientRing, ring_steps
from mtraining.ring.sinks import sinks_gradient, with_sinks
from mtraining.ring.tape import Recorded, current_tape
from mtraining.ring.timeline import timed_pass
from mtraining.ring.topology import PendingSum, Ring
from mtraining.ring.window import WindowGradients, WindowRoute, window_steps


@overload
def sparse_ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern | str, layout: Layout | str, mesh: DeviceMesh | None,
    scale: float | None = None, return_index: Literal[False] = False, kernel: str = "auto", padding: int = 0,
    starts: Tensor | None = None, window: Window | None = None, sinks: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def sparse_ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern | str, layout: Layout | str, mesh: DeviceMesh | None,
    scale: float | None = None, return_index: Literal[True], kernel: str = "auto", padding: int = 0,
    starts: Tensor | None = None, window: Window | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, SparseIndex]: ...  # fmt: skip
def sparse_ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern | str, layout: Layout | str, mesh: DeviceMesh | None,
    scale: float | None = None, return_index: bool = False, kernel: str = "auto", padding: int = 0,
    starts: Tensor | None = None, window: Window | None = None, sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, SparseIndex]:  # fmt: skip
    """Causal attention over the entries that ``pattern`` selects, on this rank's shard of the sequence.

    The result equals single-device attention under the same index for every layout, ring and number of ranks; gradients
    flow through the selected entries and none through the selection.

    Args:
        q: (batch, local tokens, q_heads, head_dim), after rotary embedding, in the layout's local order.
        k, v: (batch, local tokens, kv_heads, head_dim), same dtype; kv_heads divides q_heads.
        pattern: what to attend, an object or the name of one with its default options.
        layout: who holds which tokens, an object or a name.
        mesh: the context-parallel ranks: None for one process, a 1-D mesh for a flat ring, a 2-D
            (outer, inner) mesh for a hierarchical one. Any subgroup of the world.
        scale: factor on q.k; head_dim ** -0.5 by default.
        return_index: return the index as well, whole on every rank (a collective for patterns with block lists).
        kernel: backend, ``auto`` or one of ``mtraining.kernel.backend.KERNELS``.
        padding: tokens at the end of the whole sequence that only fill it up. They do not take part in the estimate,
            and no real token sees them; what comes out for them means nothing.
        starts: int32 (batch, tokens of the whole sequence), the first key that each query may attend, in global order
            and the same on every rank, on q's device (:mod:`mtraining.kernel.starts`). None: 0 everywhere. Packed
            documents are such starts.
        window: a query attends to the last ``window`` tokens only, itself among them; or, given
            :class:`mtraining.kernel.Chunks`, to its own chunk. Together with ``starts`` both bounds hold, and chunks
            are counted from each document's first token. Keys out of a rank's reach do not travel to it.
        sinks: (q_heads,) logits that take part in each row's softmax and have no value (see
            :mod:`mtraining.ring.sinks`); differentiable. The pattern chooses as if there were none.

    Returns:
        out (batch, local tokens, q_heads, head_dim) in q's dtype; with ``return_index`` (out, index).

    Raises:
        UserError: shapes, lengths or a kernel that cannot be served, naming the option and the remedy; or a call from
            compiled code, which goes through :class:`mtraining.ring.AttentionRuntime`.
    """
    if torch.compiler.is_compiling():
        raise UserError(
            "sparse_ring_attention: torch.compile cannot trace it; make an mtraining.ring.AttentionRuntime outside of "
            "the compiled code and call that."
        )
    pattern = build_pattern(pattern) if isinstance(pattern, str) else pattern
    layout = build_layout(layout) if isinstance(layout, str) else layout
    out, call = _SparseRingAttention.apply(
        q, k, v, sinks, pattern, layout, mesh, scale, kernel, padding, starts, window
    )
    return (out, call.index.whole(call.plan.ring)) if return_index else out


@dataclass(frozen=True)
class PreparedCall:
    """One attention call once its index is known: what forward and backward share besides tensors.

    Attributes:
        plan: where every rank's blocks stand.
        kernels: what computes.
        index: what is attended to.
        scale: factor on q.k.
        route: how keys travel under a window; None for round the ring.
    """

    plan: RingPlan
    kernels: AttentionKernels
    index: SparseIndex
    scale: float
    route: WindowRoute | None = None


class _SparseRingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, pattern: Pattern, layout: Layout,
        mesh: DeviceMesh | None, scale: float | None, kernel: str, padding: int,
        starts: Tensor | None, window: Window | None,
    ) -> tuple[Tensor, PreparedCall]:  # fmt: skip
        out, lse, ctx.call = attend(
            q, k, v, pattern, layout, mesh, scale, kernel, padding, starts, window, sinks
        )
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        return out, ctx.call

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        return *attend_backward(dout, q, k, v, out, lse, ctx.call, sinks), *(None,) * 8


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: Layout, mesh: DeviceMesh | None,
    scale: float | None, kernel: str, padding: int = 0, starts: Tensor | None = None, window: Window | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, PreparedCall]:  # fmt: skip
    """The forward pass without autograd: out in q's dtype, lse (batch, heads, rows), and what backward must know.

    Both are those with ``sinks``, where there are any.
    """
    _check(q, k, v, sinks)
    ring = Ring.over(mesh)
    if not 0 <= padding < q.shape[1] * ring.world:
        raise UserError(
            f"padding: {padding} of {q.shape[1] * ring.world} tokens leaves no sequence; give fewer, and at least 0."
        )
    plan = make_plan(ring, layout, q.shape[1] * ring.world, pattern.block_size, q.device)
    backend = select_backend(kernel, q.device, q.dtype, q.shape[-1])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    packed = starts is not None
    starts = plan.starts(q.shape[0], starts, window)
    if starts is not None:
        check_starts_kernel(kernel)
    shard = plan.shard(backend, padding, starts, packed)

    def prepare(index: SparseIndex | None) -> PreparedCall:
        if index is None:
            index = pattern.estimate(q.detach(), k.detach(), shard, scale)
            # Patterns, and indices held from an earlier step, know nothing of this batch's documents.
            index = index if starts is None else replace(index, starts=starts)
        return PreparedCall(plan, backend, index, scale, plan.route(window))

    def seen(lse: Tensor, index: SparseIndex) -> None:
        observe(q, k, lse, index, plan, shard, scale, window)

    return attend_prepared(q, k, v, prepare, seen, sinks)


def attend_prepared(
    q: Tensor, k: Tensor, v: Tensor, prepare: Callable[[SparseIndex | None], PreparedCall],
    seen: Callable[[Tensor, SparseIndex], None] = lambda lse, index: None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, PreparedCall]:  # fmt: skip
    """The forward pass of a call that ``prepare`` makes, under the tape in force, if any.

    The first pass through a layer prepares with None, and the tape keeps the index. Layer recompute prepares with the
    index of that pass; where the tape kept (out, lse) too, the ring does not turn again.

    Args:
        prepare: makes the call, with the index given or with one of its own.
        seen: told of the lse over keys, without sinks, and the index after a first pass.
        sinks: (q_heads,), or None for attention without.

    Returns:
        out in q's dtype, lse (batch, heads, rows), and the call, for :func:`attend_backward`.
    """
    tape = current_tape()
    if tape is not None and tape.replaying:
        recorded = tape.read()
        call = prepare(recorded.index)
        if recorded.out is not None and recorded.lse is not None:
            return recorded.out.detach(), recorded.lse, call
        return *_attention(q, k, v, call, sinks), call
    call = prepare(None)
    out, lse = _attention(q, k, v, call, sinks, lambda lse: seen(lse, call.index))
    if tape is not None:
        kept = (out.detach(), lse) if tape.keep_outputs else (None, None)
        tape.write(Recorded(call.index, *kept))
    return out, lse, call


def _attention(
    q: Tensor, k: Tensor, v: Tensor, call: PreparedCall, sinks: Tensor | None,
    seen: Callable[[Tensor], None] = lambda lse: None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = ring_forward(q, k, v, call)
    seen(lse)
    return (out, lse) if sinks is None else with_sinks(out, lse, sinks)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: PreparedCall,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The gradients of q, k, v and sinks, in their dtypes; those of sinks are this rank's share."""
    dq, dkv = ring_backward(dout, q, k, v, out, lse, call)
    dk, dv = dkv.to(k.dtype)
    if sinks is None:
        return dq, dk, dv, None
    return dq, dk, dv, sinks_gradient(call.kernels.row_delta(out, dout), lse, sinks)


@timed_pass("forward")
def ring_forward(q: Tensor, k: Tensor, v: Tensor, call: PreparedCall) -> tuple[Tensor, Tensor]:
    """out (batch, rows, heads, head_dim) in q's dtype, lse (batch, heads, rows) in the accumulation dtype."""
    kernels, index = call.kernels, call.index
    out: Tensor | None = None
    lse: Tensor | None = None
    columns: PendingSum | None = None
    for visit in _visits(k, v, call):
        if visit.number == 0:
            columns = _start_columns(k, v, call)
        kv, final = visit.kv, visit.last
        if kv is None or visit.placement is None:
            continue
        # Columns are summed over ranks in the background. The last step attends to them, so that every earlier step
        # hides that transfer.
        compact = _arrived(columns) if final and columns is not None else None
        out, lse = kernels.tiles_forward(
            q, kv[0], kv[1], index, visit.placement, call.scale, out, lse, columns=compact, final=final
        )  # fmt: skip
        # Its memory is for the keys to come.
        del kv, visit
    assert out is not None and lse is not None
    return out, lse


@timed_pass("backward")
def ring_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: PreparedCall
) -> tuple[Tensor, Tensor]:
    """dq in q's dtype; dk and dv, stacked, in the accumulation dtype.

    ``out`` and ``lse`` are the global ones, so that the gradients of single steps simply add.
    """
    plan, kernels, index, scale = call.plan, call.kernels, call.index, call.scale
    delta = kernels.row_delta(out, dout)
    travelling = WindowGradients(plan.ring) if call.route is not None else GradientRing(plan.ring)
    half = _number_of_visits(call) // 2
    dq: Tensor | None = None
    columns: PendingSum | None = None
    column_gradients: PendingSum | None = None
    for visit in _visits(k, v, call, backward=True):
        if visit.number == 0:
            columns = _start_columns(k, v, call)
        kv = visit.kv
        if kv is None or visit.placement is None:
            travelling.add(None, visit.step)
            continue
        compact = None
        # The first half of the steps hides the transfer of columns, the second half that of their gradients.
        if visit.number == half and columns is not None:
            compact, columns = _arrived(columns), None
            grads = kernels.columns_backward(dout, q, *compact, lse, delta, index, plan.q_blocks, scale)
            column_gradients = plan.ring.start_sum(grads)
            del grads
        share, query_gradient = kernels.tiles_backward(
            dout, q, kv[0], kv[1], lse, delta, index, visit.placement, scale
        )
        travelling.add(share, visit.step)
        # The share is on its way. The last one has only the rest of this step to hide under.
        del share
        dq = query_gradient(dq, columns=compact, final=visit.last)
        del kv, visit, query_gradient
    assert dq is not None
    dkv = travelling.finish()
    if column_gradients is not None:
        kernels.scatter_columns(column_gradients.wait(), index.columns, plan.slots, dkv)
    return dq, dkv


class _Visit(NamedTuple):
    """Keys of some rank, here to be attended to; None where a step brings none. ``number`` counts those that come."""

    number: int
    step: Any
    placement: Placement | None
    kv: Sequence[Tensor] | Tensor | None
    last: bool


def _visits(k: Tensor, v: Tensor, call: PreparedCall, backward: bool = False) -> Iterator[_Visit]:
    """The keys that this rank's queries attend to, its own first: round the ring, or by the route of a window."""
    plan = call.plan
    if call.route is None:
        for step, kv in ring_steps((k, v), plan.ring, own_node_last=backward):
            last = step.number + 1 == plan.ring.world
            yield _Visit(step.number, step, plan.placements[step.source], kv, last)
            del kv
        return
    number = 0
    for visit in window_steps((k, v), plan.ring, call.route):
        place = plan.placements[plan.ring.rank] if visit.step is None else visit.step.placement
        yield _Visit(number, visit.step, place, visit.kv, visit.last)
        number += visit.kv is not None
        del visit


def _number_of_visits(call: PreparedCall) -> int:
    if call.route is None:
        return call.plan.ring.world
    return 1 + sum(step.placement is not None for step in call.route.steps)


def _arrived(columns: PendingSum) -> Columns:
    ck, cv = columns.wait()
    return ck, cv


def _start_columns(k: Tensor, v: Tensor, call: PreparedCall) -> PendingSum | None:
    """Begin fetching every selected column's key and value: (2, batch, capacity, q_heads, head_dim), if any."""
    if call.index.columns.shape[-1] == 0:
        return None
    return call.plan.ring.start_sum(call.kernels.gather_columns(k, v, call.index.columns, call.plan.slots))


def _check(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    if sinks is not None and (q.ndim != 4 or sinks.shape != q.shape[2:3]):
        raise UserError(
            f"sinks: shape {tuple(sinks.shape)} does not fit q of shape {tuple(q.shape)}; give one number for each "
            "query head."
        )
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise UserError(
            f"q, k, v: shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit; "
            "use (batch, tokens, heads, head_dim), with k and v alike."
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise UserError(
            f"q, k: shapes {tuple(q.shape)} and {tuple(k.shape)} differ in batch, tokens or head_dim; "
            "give the same tokens and head_dim to both."
        )
    if q.shape[2] % k.shape[2]:
        raise UserError(f"k: {k.shape[2]} kv heads do not divide {q.shape[2]} query heads; use a divisor.")
    if not q.dtype == k.dtype == v.dtype:
        raise UserError(f"q, k, v: dtypes {q.dtype}, {k.dtype}, {v.dtype} differ; cast them to one.")
