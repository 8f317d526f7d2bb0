"""Sparse ring attention: the autograd function that joins pattern, layout, ring and kernel.

Read this file top to bottom for the whole forward and backward of one attention layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mtraining.errors import UserError
from mtraining.kernel import Backend, SparseIndex, select_backend
from mtraining.kernel.backend import Columns
from mtraining.layout import Layout, build_layout
from mtraining.pattern import Pattern, build_pattern
from mtraining.ring.observe import observe
from mtraining.ring.plan import RingPlan, make_plan
from mtraining.ring.schedule import GradientRing, ring_steps
from mtraining.ring.tape import Recorded, current_tape
from mtraining.ring.timeline import timed_pass
from mtraining.ring.topology import PendingSum, Ring


@overload
def sparse_ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern | str, layout: Layout | str, mesh: DeviceMesh | None,
    scale: float | None = None, return_index: Literal[False] = False, kernel: str = "auto", padding: int = 0,
) -> Tensor: ...  # fmt: skip
@overload
def sparse_ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern | str, layout: Layout | str, mesh: DeviceMesh | None,
    scale: float | None = None, return_index: Literal[True], kernel: str = "auto", padding: int = 0,
) -> tuple[Tensor, SparseIndex]: ...  # fmt: skip
def sparse_ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern | str, layout: Layout | str, mesh: DeviceMesh | None,
    scale: float | None = None, return_index: bool = False, kernel: str = "auto", padding: int = 0,
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
    out, call = _SparseRingAttention.apply(q, k, v, pattern, layout, mesh, scale, kernel, padding)
    return (out, call.index.whole(call.plan.ring)) if return_index else out


@dataclass(frozen=True)
class Call:
    """What forward and backward share besides tensors that autograd tracks."""

    plan: RingPlan
    backend: Backend
    index: SparseIndex
    scale: float

    @property
    def slots(self) -> Tensor:
        """int64 (seq_len,): local place of a global position on this rank, -1 elsewhere."""
        return self.plan.shard(self.backend).slots


class _SparseRingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Call]:
        out, lse, ctx.call = attend(q, k, v, *settings)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, ctx.call

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *attend_backward(dout, q, k, v, out, lse, ctx.call), *(None,) * 6


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, layout: Layout, mesh: DeviceMesh | None,
    scale: float | None, kernel: str, padding: int = 0,
) -> tuple[Tensor, Tensor, Call]:  # fmt: skip
    """The forward pass without autograd: out in q's dtype, lse (batch, heads, rows), and what backward must know."""
    _check(q, k, v)
    ring = Ring.over(mesh)
    if not 0 <= padding < q.shape[1] * ring.world:
        raise UserError(
            f"padding: {padding} of {q.shape[1] * ring.world} tokens leaves no sequence; give fewer, and at least 0."
        )
    plan = make_plan(ring, layout, q.shape[1] * ring.world, pattern.block_size, q.device)
    backend = select_backend(kernel, q.device, q.dtype, q.shape[-1])
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    tape = current_tape()
    if tape is not None and tape.replaying:
        recorded = tape.read()
    else:
        recorded = Recorded(pattern.estimate(q.detach(), k.detach(), plan.shard(backend, padding), scale))
    call = Call(plan, backend, recorded.index, scale)
    if recorded.out is not None and recorded.lse is not None:
        return recorded.out.detach(), recorded.lse, call
    out, lse = _ring_forward(q, k, v, call)
    if tape is None or not tape.replaying:
        observe(q, k, lse, recorded.index, plan, plan.shard(backend, padding), scale)
        if tape is not None:
            tape.write(Recorded(recorded.index, out.detach(), lse) if tape.keep_outputs else recorded)
    return out, lse, call


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their dtypes."""
    dq, dkv = _ring_backward(dout, q, k, v, out, lse, call)
    dk, dv = dkv.to(k.dtype)
    return dq, dk, dv


@timed_pass("forward")
def _ring_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """out (batch, rows, heads, head_dim) in q's dtype, lse (batch, heads, rows) in the accumulation dtype."""
    plan, backend, index = call.plan, call.backend, call.index
    out: Tensor | None = None
    lse: Tensor | None = None
    columns: PendingSum | None = None
    for step, kv in ring_steps((k, v), plan.ring):
        if step.number == 0:
            columns = _start_columns(k, v, call)
        final = step.number + 1 == plan.ring.world
        # Until the last step, which takes them along, all others hide the columns' way here.
        compact = _arrived(columns) if final and columns is not None else None
        out, lse = backend.tiles_forward(
            q, kv[0], kv[1], index, plan.placements[step.source], call.scale, out, lse, columns=compact, final=final
        )  # fmt: skip
        del kv  # its memory is for the keys to come
    assert out is not None and lse is not None
    return out, lse


@timed_pass("backward")
def _ring_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """dq in q's dtype; dk and dv, stacked, in the accumulation dtype; from the global out and lse: partial gradients
    add."""
    plan, backend, index, scale = call.plan, call.backend, call.index, call.scale
    delta = backend.row_delta(out, dout)
    home, dq = GradientRing(plan.ring), None
    columns: PendingSum | None = None
    columns_home: PendingSum | None = None
    for step, kv in ring_steps((k, v), plan.ring, own_node_last=True):
        if step.number == 0:
            columns = _start_columns(k, v, call)
        compact = None
        # Half of the steps hide the columns' way here, the other half their gradients' way home.
        if step.number == plan.ring.world // 2 and columns is not None:
            compact, columns = _arrived(columns), None
            grads = backend.columns_backward(dout, q, *compact, lse, delta, index, plan.q_blocks, scale)
            columns_home = plan.ring.start_sum(grads)
            del grads
        share, query_gradient = backend.tiles_backward(
            dout, q, kv[0], kv[1], lse, delta, index, plan.placements[step.source], scale
        )
        home.add(share, step)
        del share  # on its way; under the last one, no step is left but the rest of this
        dq = query_gradient(dq, columns=compact, final=step.number + 1 == plan.ring.world)
        del kv, query_gradient
    assert dq is not None
    dkv = home.finish()
    if columns_home is not None:
        backend.scatter_columns(columns_home.wait(), index.columns, call.slots, dkv)
    return dq, dkv


def _arrived(columns: PendingSum) -> Columns:
    ck, cv = columns.wait()
    return ck, cv


def _start_columns(k: Tensor, v: Tensor, call: Call) -> PendingSum | None:
    """Begin fetching every selected column's key and value: (2, batch, capacity, q_heads, head_dim), if any."""
    if call.index.columns.shape[-1] == 0:
        return None
    return call.plan.ring.start_sum(call.backend.gather_columns(k, v, call.index.columns, call.slots))


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
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
