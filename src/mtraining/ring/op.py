"""Sparse ring attention as two opaque operators, so that a compiled model calls it without a graph break.

torch.compile sees shapes only; what runs is the same Python as in eager mode, forward and backward, with its
collectives, estimation, tapes and observers. Three things cannot pass through an operator, and go round it:

* the settings (pattern, layout, mesh, kernel) are looked up by a number, which is a tensor and not an int: the compiler
  specialises on ints, and layers that differ in settings share one compiled graph this way;
* the starts of a batch are read where :class:`BatchStarts` has them, since no layer of a model passes them on;
* what backward must know (:class:`mtraining.ring.attention.PreparedCall`, the index above all) belongs to the lse that
  was computed with it, and lives as long as that tensor's memory.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.reductions import StorageWeakRef

from mtraining.kernel import Window
from mtraining.kernel.reference.attention import accumulation_dtype
from mtraining.layout import Layout
from mtraining.pattern import Pattern
from mtraining.ring.attention import PreparedCall, attend, attend_backward, sparse_ring_attention

_numbers = itertools.count()
_bound: WeakValueDictionary[int, AttentionRuntime] = WeakValueDictionary()
_calls: dict[int, tuple[StorageWeakRef, PreparedCall]] = {}


@dataclass(eq=False)
class BatchStarts:
    """The starts of the batch at work, shared by a model's layers: set before a forward, read by each attention call.

    Attributes:
        value: int32 (batch, seq_len) in global order, or None (:mod:`mtraining.kernel.starts`).
    """

    value: Tensor | None = None


class AttentionRuntime:
    """:func:`mtraining.ring.sparse_ring_attention` with its settings bound, in compiled code as in eager.

    Make it outside of compiled code, and keep it as long as it is called.

    Args:
        window: as :func:`mtraining.ring.sparse_ring_attention` takes it, None without one.
        starts: where to look for the starts of each batch; None where batches have none.
    """

    def __init__(
        self, pattern: Pattern, layout: Layout, mesh: DeviceMesh | None, kernel: str = "auto",
        window: Window | None = None, starts: BatchStarts | None = None,
    ) -> None:  # fmt: skip
        self.pattern, self.layout, self.mesh, self.kernel = pattern, layout, mesh, kernel
        self.window, self.starts = window, BatchStarts() if starts is None else starts
        number = next(_numbers)
        self.number = torch.tensor(number)  # int64, on the CPU: to read it waits for no device
        _bound[number] = self

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """Shapes, result and errors are those of :func:`mtraining.ring.sparse_ring_attention`."""
        if torch.compiler.is_compiling():
            return _attend(q, k, v, sinks, self.number, scale)[0]
        return sparse_ring_attention(
            q, k, v, pattern=self.pattern, layout=self.layout, mesh=self.mesh, scale=scale, kernel=self.kernel,
            starts=self.starts.value, window=self.window, sinks=sinks,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is a binding of its own."""
        return type(self), (self.pattern, self.layout, self.mesh, self.kernel, self.window, self.starts)


@torch.library.custom_op("mtraining::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, number: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    bound = _bound.get(int(number))
    if bound is None:
        raise RuntimeError(
            "the AttentionRuntime of a compiled attention no longer exists; keep its model alive"
        )
    out, lse, call = attend(
        q, k, v, bound.pattern, bound.layout, bound.mesh, scale, bound.kernel, starts=bound.starts.value,
        window=bound.window, sinks=sinks,
    )  # fmt: skip
    out, lse = out.contiguous(), lse.contiguous()
    _remember(lse, call)
    return out, lse


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, number: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    lse = q.new_empty(batch, heads, rows, dtype=accumulation_dtype(q.dtype))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("mtraining::attend_backward", mutates_args=())
def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operator returns tensors only: the gradient of absent sinks is an empty one."""
    dq, dk, dv, dsinks = attend_backward(dout, q, k, v, out, lse, _recall(lse), sinks)
    # dk and dv may share memory, which outputs of an operator must not.
    dv = dv.clone(memory_format=torch.contiguous_format)
    return dq.contiguous(), dk.contiguous(), dv, q.new_empty(0) if dsinks is None else dsinks


@_attend_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.set_materialize_grads(False)  # lse has none


def _gradients(ctx: Any, dout: Tensor, _: None) -> tuple[Tensor | None, ...]:
    *gradients, dsinks = _attend_backward(dout, *ctx.saved_tensors)
    return *gradients, dsinks if ctx.needs_input_grad[3] else None, None, None


_attend.register_autograd(_gradients, setup_context=_save)


def _remember(lse: Tensor, call: PreparedCall) -> None:
    for key in [key for key, (storage, _) in _calls.items() if storage.expired()]:
        del _calls[key]
    storage = StorageWeakRef(lse.untyped_storage())
    _calls[storage.cdata] = storage, call


def _recall(lse: Tensor) -> PreparedCall:
    storage = StorageWeakRef(lse.untyped_storage())
    if storage.cdata not in _calls:
        raise RuntimeError(
            "a compiled attention's backward was given a copy of what its forward saved, and the index belongs to the "
            "original; do not offload or copy saved tensors of compiled layers"
        )
    return _calls[storage.cdata][1]
