"""Results of a layer's products of matrices, kept in the first pass and given back when the layer is recomputed.

Products are most of what recompute costs, and what is left of a layer (norms, rotary embedding, the gate of an MLP)
runs again in little time. A product's result is given back below autograd: the graph of the second pass is the usual
one, and backward computes the same bits. torch's own selective checkpointing works the same way; it neither leaves out
the last product, which nobody needs, nor protects a result that later code overwrites.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtraining.model.support import attention_modules, layers_of
from mtraining.ring.tape import Tape

PROJECTIONS, MLP = "projections", "mlp"
"""Products in a layer's attention module, and all others."""

_aten = torch.ops.aten
PRODUCTS = {
    getattr(_aten, name)
    for name in ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm")
    if hasattr(_aten, name)
}


class ProductTape(Tape):
    """Products of one pass through one layer. A result is given back once, and not after the model has overwritten it:
    a replay then computes it.

    Args:
        parts: whose results are kept, of `PROJECTIONS` and `MLP`.
        copied: of them, those that are kept as copies, since later code overwrites the originals.
    """

    _local = threading.local()

    def __init__(self, parts: frozenset[str], copied: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.parts, self.copied = parts, copied
        self.part: str | None = None
        """Of the module that runs, None between such modules."""
        self._needed = 0

    @contextmanager
    def record(self) -> Iterator[None]:
        self._needed = 0
        with super().record():
            yield
        # Nothing follows the last product: backward needs what goes into it, and recompute ends before it.
        if len(self._made) > self._needed:
            self._made[-1] = None

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Around a module whose products are of ``part``."""
        mode: AbstractContextManager[Any] = _Products(self) if part in self.parts else nullcontext()
        self.part = part
        try:
            with mode:
                yield
        finally:
            self.part = None

    def settle(self) -> None:
        """What was recorded so far is needed by what follows."""
        self._needed = len(self._made)

    def result(self, compute: Callable[[], Tensor]) -> Tensor:
        """The next product: computed and kept in the first pass, given back in a replay."""
        if not self.replaying:
            made = compute()
            # An alias: the tensor itself is about to become a part of the graph, which would never be freed.
            kept = made.clone() if self.part in self.copied else _alias(made)
            self._made.append((kept, kept._version))
            return made
        number = self._next
        self._next += 1
        if number >= len(self._made):
            return compute()
        entry: tuple[Tensor, int] | None = self._made[number]
        self._made[number] = None
        if entry is None or entry[0]._version != entry[1]:  # overwritten by an operation that autograd knows
            return compute()
        return entry[0]


def _alias(tensor: Tensor) -> Tensor:
    """The same memory, whose version counts what autograd knows to overwrite it. Below autograd, where a dispatch mode
    stands, versions are shared only under this guard."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _Products(TorchDispatchMode):
    """Sees every operation of a module; products go by the tape."""

    def __init__(self, tape: ProductTape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def compute() -> Any:
            return func(*args, **(kwargs or {}))

        return self._tape.result(compute) if func.overloadpacket in PRODUCTS else compute()


def mark_products(model: Any) -> None:
    """Let the modules of every decoder layer that multiply matrices tell the tape in force, in place.

    These are the linear layers, those inside an adapter too, and modules with stacked matrices, as experts are.
    """
    attention = {id(part) for _, module in attention_modules(model) for part in module.modules()}
    for layer in layers_of(model):
        for module in layer.modules():
            own = list(module.parameters(recurse=False))
            part = PROJECTIONS if id(module) in attention else MLP
            if isinstance(module, nn.Linear):
                module.forward = _told(module.forward, part, settles=False)  # type: ignore[method-assign]
            elif any(parameter.ndim > 2 for parameter in own):
                module.forward = _told(module.forward, part, settles=True)
            elif own and id(module) not in attention:
                module.register_forward_pre_hook(_settle)  # a norm


def _told(forward: Callable[..., Any], part: str, settles: bool) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tape = ProductTape.current()
        if tape is None:
            return forward(*args, **kwargs)
        with tape.inside(part):
            result = forward(*args, **kwargs)
        if settles:  # it weighs its products itself
            tape.settle()
        return result

    return wrapper


def _settle(module: nn.Module, args: Any) -> None:
    tape = ProductTape.current()
    if tape is not None:
        tape.settle()
