"""How much memory one layer and the loss take, found by running them on the meta device: shapes without numbers.

transformers' own layers, our recompute, the chunked loss and the ring's own code run there exactly as they would on a
GPU; only kernels and transfers are replaced, by what they allocate. Every new storage is counted until autograd or
Python lets go of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtraining.kernel import SparseIndex
from mtraining.kernel.backend import Columns, QueryGradient
from mtraining.kernel.reference.attention import accumulation_dtype
from mtraining.layout import Layout
from mtraining.model import ParallelLM
from mtraining.model.attention import attach
from mtraining.model.products import PRODUCTS, ProductTape
from mtraining.model.support import attention_modules, layers_of
from mtraining.pattern import Pattern
from mtraining.ring.attention import PreparedCall, attend_backward, attend_prepared
from mtraining.ring.plan import make_plan
from mtraining.ring.topology import PendingSum, Ring

META = torch.device("meta")
LAYERS = 2  # the second layer's share is what each further one takes


@dataclass(frozen=True)
class Again:
    """Products of matrices that are computed again: their floating-point operations, and bytes of their results."""

    flops: int = 0
    size: int = 0

    @staticmethod
    def of(func: Any, args: Sequence[Any], result: Tensor) -> Again:
        """Of one product; a bias comes before the two factors."""
        biased = func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.baddbmm)
        return Again(2 * result.numel() * args[biased].shape[-1], result.numel() * result.element_size())

    def __add__(self, other: Again) -> Again:
        return Again(self.flops + other.flops, self.size + other.size)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside it and still alive; the highest count by phase."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.phase = "start"
        self.peaks: dict[str, int] = {}
        self.begins: dict[str, int] = {}
        self.attention = 0  # most bytes that one pass of attention had at a time, beside its inputs
        self.again: dict[str, Again] = {}  # products of matrices that recompute repeated, by part
        self._sizes: dict[int, int] = {}
        self._top = 0

    def begin(self, phase: str) -> None:
        """What follows belongs to ``phase``."""
        self.phase = phase
        self.begins.setdefault(phase, self.live)
        self._saw(self.live)

    @contextmanager
    def in_attention(self) -> Iterator[None]:
        before, outer = self.live, self._top
        self._top = before
        yield
        self.attention = max(self.attention, self._top - before)
        self._top = max(outer, self._top)

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that were there before."""
        self._sizes |= {tensor.untyped_storage()._cdata: 0 for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            result = args[0].new_empty(_grouped_shape(*args, **(kwargs or {})))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        tape = ProductTape.current()
        if tape is not None and tape.part is not None and tape.replaying and func.overloadpacket in PRODUCTS:
            self.again[tape.part] = self.again.get(tape.part, Again()) + Again.of(func, args, result)
        if func is torch.ops.aten.logsumexp.default:  # it makes a copy of its input, inside
            self._saw(self.live + args[0].numel() * args[0].element_size())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._gone, key)
        self._saw(self.live)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def _saw(self, total: int) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), total)
        self._top = max(self._top, total)


def _grouped_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any) -> tuple[int, ...]:
    """Of a product by groups, as experts take it: PyTorch's own shapes are for bf16 alone, and CPUs take fp32 too."""
    if a.dim() == b.dim() == 2 and offs is not None:
        return offs.numel(), a.shape[0], b.shape[1]
    return (*(a.shape[:-2] if b.dim() == 3 else ()), a.shape[-2], b.shape[-1])


class ShapeKernels:
    """Implements :class:`mtraining.kernel.AttentionKernels` in shapes: they allocate what a GPU's do."""

    name = "shapes"

    def tiles_forward(
        self, q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, placement: Any, scale: float,
        out: Tensor | None, lse: Tensor | None, *, columns: Columns | None = None, final: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # A dense kernel's own result, before it is merged.
        part = torch.zeros_like(q) if index.dense else None
        new, new_lse = self._partial(q, out, lse)
        del part
        return new.to(q.dtype) if final else new, new_lse

    def tiles_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        placement: Any, scale: float,
    ) -> tuple[Tensor, QueryGradient]:  # fmt: skip
        # A dense kernel has a dq of its own, which it sums in fp32.
        work = torch.zeros_like(q, dtype=lse.dtype) if index.dense else None
        parts = [torch.zeros_like(q)] if index.dense else []
        share = k.new_zeros(2, *k.shape, dtype=lse.dtype)
        del work

        def query_gradient(
            dq: Tensor | None, *, columns: Columns | None = None, final: bool = False
        ) -> Tensor:
            straight = final and dq is None and not index.dense  # written in q's dtype at once
            if dq is None:
                dq = torch.zeros_like(q, dtype=q.dtype if straight else lse.dtype)
            parts.clear()
            return dq.to(q.dtype) if final else dq

        return share, query_gradient

    def columns_backward(
        self, dout: Tensor, q: Tensor, ck: Tensor, cv: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        q_blocks: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        return ck.new_zeros(2, *ck.shape, dtype=lse.dtype)

    def row_delta(self, out: Tensor, dout: Tensor) -> Tensor:
        batch, rows, heads, _ = out.shape
        return out.new_zeros(batch, heads, rows, dtype=accumulation_dtype(out.dtype))

    def gather_columns(self, k: Tensor, v: Tensor, columns: Tensor, slots: Tensor) -> Tensor:
        return k.new_zeros(2, columns.shape[0], columns.shape[2], columns.shape[1], k.shape[-1])

    def scatter_columns(self, grads: Tensor, columns: Tensor, slots: Tensor, dkv: Tensor) -> None:
        return None

    def _partial(self, q: Tensor, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
        if out is not None and lse is not None:
            return out, lse
        batch, rows, heads, _ = q.shape
        dtype = accumulation_dtype(q.dtype)
        return torch.zeros_like(q, dtype=dtype), q.new_zeros(batch, heads, rows, dtype=dtype)


class _Arrived:
    """A transfer: its payload is held until it is waited for, and what is received is as large."""

    def __init__(self, payload: Tensor) -> None:
        self._payload, self._received = payload, torch.empty_like(payload)

    def wait(self) -> Tensor:
        return self._received


class ShapeRing(Ring):
    """The first rank of a ring whose other ranks do not exist."""

    def __init__(self, outer: int, inner: int) -> None:
        super().__init__(None)
        self.outer, self.inner = outer, inner

    def inner_hop(self, payload: Tensor) -> Any:
        return _Arrived(payload)

    def outer_hop(self, payload: Tensor) -> Any:
        return _Arrived(payload)

    def home_hop(self, payload: Tensor, outer_step: int) -> Any:
        return _Arrived(payload)

    def start_sum(self, x: Tensor) -> PendingSum:
        return PendingSum(x, None)


class _Attention(torch.autograd.Function):
    """Attention under an index that is given, its memory measured."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, runtime: ShapeRuntime
    ) -> Tensor:
        with runtime.live.in_attention():
            out, lse, _ = attend_prepared(q, k, v, runtime.prepare, sinks=sinks)
        ctx.runtime = runtime
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        with ctx.runtime.live.in_attention():
            return *attend_backward(grads[0], q, k, v, out, lse, ctx.runtime.call, sinks), None


@dataclass
class ShapeRuntime:
    """Stands in an attention module for :class:`mtraining.ring.AttentionRuntime`."""

    call: PreparedCall
    live: LiveBytes

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        return _Attention.apply(q, k, v, sinks, self)

    def prepare(self, index: SparseIndex | None) -> PreparedCall:
        """The call with an index of its own, as each layer's estimate makes, or with the one of the first pass."""
        return replace(self.call, index=copied(self.call.index) if index is None else index)


def copied(index: SparseIndex) -> SparseIndex:
    """An index of one's own, as each layer's estimate makes."""
    return replace(index, diagonals=index.diagonals.clone(), columns=index.columns.clone())


def shape_call(
    pattern: Pattern, layout: Layout, ring: tuple[int, int], seq_len: int, batch: int, heads: int, columns: int,
    device: torch.device = META,
) -> PreparedCall:  # fmt: skip
    """What a layer's attention needs, for rank 0 of an (outer, inner) ring.

    Args:
        columns: capacity of the index's column lists, 0 for none.
    """
    plan = make_plan(ShapeRing(*ring), layout, seq_len, pattern.block_size, device)
    blocks = seq_len // pattern.block_size
    index = SparseIndex(
        seq_len,
        pattern.block_size,
        torch.zeros(batch, heads, blocks, dtype=torch.bool, device=device),
        torch.zeros(batch, heads, columns, dtype=torch.int32, device=device),
        dense=pattern.name == "dense",
    )
    return PreparedCall(plan, ShapeKernels(), index, 1.0)


@dataclass(frozen=True)
class Trace:
    """Bytes of activations of a model of :data:`LAYERS` layers, by moment: all but parameters and their gradients.

    Attributes:
        kept: what each layer holds between forward and backward.
        forward, loss, backward, last: peaks in the last layer's forward, in the loss, in the last layer's backward (the
            first to run) and in the first layer's.
        attention: most that one pass of attention has at a time: keys in flight, sums in fp32, columns.
        again: of one layer, what recompute repeats of its products, by part of `mtraining.model.products`; empty
            where nothing tells them apart.
    """

    kept: int
    forward: int
    loss: int
    backward: int
    last: int
    attention: int
    again: Mapping[str, Again]

    @staticmethod
    def highest(traces: Sequence[Trace]) -> Trace:
        """Every number at its highest; what recompute repeats is that of the first."""
        sizes = [field.name for field in fields(Trace) if field.name != "again"]
        return replace(traces[0], **{name: max(getattr(one, name) for one in traces) for name in sizes})


def trace(model: ParallelLM, call: PreparedCall, batch: int, local_tokens: int) -> Trace:
    """Run a parallelized meta model of :data:`LAYERS` layers once, forward and backward."""
    live = LiveBytes()
    for _, module in attention_modules(model.hf_model):
        attach(module, ShapeRuntime(call, live))
    layers = layers_of(model.hf_model)
    tokens = {
        name: torch.zeros(batch, local_tokens, dtype=torch.int64, device=META)
        for name in ("input_ids", "position_ids", "labels")
    }
    live.ignore([*model.parameters(), *model.buffers(), *tokens.values()])
    with _marked(layers, live), _gradients_dropped(model), live:
        loss = model(**tokens, num_labels=1)
        loss.backward()
    return Trace(
        kept=live.begins["loss"] - live.begins["forward1"],
        forward=live.peaks["forward1"],
        loss=live.peaks["loss"],
        backward=live.peaks["backward1"],
        last=live.peaks["backward0"],
        attention=live.attention,
        again={part: Again(one.flops // LAYERS, one.size // LAYERS) for part, one in live.again.items()},
    )


@contextmanager
def _marked(layers: Any, live: LiveBytes) -> Iterator[None]:
    """Phases by layer: forward0, forward1, loss, backward1, backward0, end."""

    def entering(number: int, hidden: Tensor) -> None:
        live.begin(f"forward{number}")
        before = f"backward{number - 1}" if number else "end"
        if hidden.requires_grad:  # the first layer's input does not where the embeddings are not trained
            hidden.register_hook(lambda grad: live.begin(before))

    def left(output: Any) -> None:
        live.begin("loss")
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden.register_hook(lambda grad: live.begin(f"backward{len(layers) - 1}"))

    handles = [
        layer.register_forward_pre_hook(lambda module, args, number=number: entering(number, args[0]))
        for number, layer in enumerate(layers)
    ]
    handles.append(layers[-1].register_forward_hook(lambda module, args, output: left(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _gradients_dropped(model: nn.Module) -> Iterator[None]:
    """Gradients of parameters vanish when they are whole: they are counted elsewhere, as FSDP holds them."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [
        parameter.register_post_accumulate_grad_hook(drop)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
