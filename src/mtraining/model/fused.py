"""What surrounds attention in fewer passes over memory: norms, rotary embedding, gated MLP and residual sums.

Eager, each of these is a chain of elementwise kernels that read and write whole activations. ``compile`` fuses them by
torch.compile, layer by layer, with attention an opaque operator inside; ``liger`` puts liger-kernel's Triton functions
in their place.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mtraining.errors import UserError
from mtraining.model.support import attention_modules, decoder_of, layers_of

FUSED = ("none", "compile", "liger")
_LIGER_PARTS = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the chunked loss is ours


def fuse(model: Any, how: str, device: torch.device, backend: str = "inductor") -> None:
    """Fuse what surrounds attention in every decoder layer and in the final norm, in place.

    Call it before the layers are wrapped for recompute and FSDP: both then surround the fused layer. Names in the state
    dict do not change.

    Args:
        model: a transformers causal language model that `check_supported` accepts.
        how: one of `FUSED`.
        device: where the model will run.
        backend: torch.compile's.

    Raises:
        UserError: an unknown ``how``, or one that cannot serve this model or machine.
    """
    if how not in FUSED:
        raise UserError(f"train.fused={how!r} is not known; choose one of {', '.join(FUSED)}.")
    if how == "compile":
        decoder = decoder_of(model)
        norm = getattr(decoder, "norm", None)
        for module in (*layers_of(model), *([norm] if isinstance(norm, nn.Module) else ())):
            # One graph serves all layers, since they differ in tensors only.
            module.forward = compiled_whole(
                module.forward, f"the layers of {model.config.model_type}", backend
            )
    elif how == "liger":
        if device.type == "cpu":
            raise UserError(
                "train.fused=liger needs an NVIDIA GPU, not cpu; use train.fused=none or train.fused=compile."
            )
        use_liger(model)


def compiled_whole(
    function: Callable[..., Any],
    what: str,
    backend: str = "inductor",
    *,
    dynamic: bool = False,
    option: str = "train.fused",
    remedy: str = "train.fused=none",
) -> Callable[..., Any]:
    """``function`` compiled as one graph for the shapes it meets, or for all with ``dynamic``; an error names ``what``
    cannot be compiled, the option that asked for it and the remedy."""
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(
                f"{option}: torch.compile cannot serve {what} here "
                f"({str(error).strip().splitlines()[0]}); use {remedy}."
            ) from error

    return call


def use_liger(model: Any) -> None:
    """Put liger-kernel's norms, rotary embedding and gated MLP into this model, and into no other.

    liger-kernel patches a model's modules and, for the rotary embedding, names in the transformers source file it comes
    from; the file is restored here, and the model's own attention modules alone see the replacement.

    Raises:
        UserError: liger-kernel is missing, or does not know the model.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UserError(
            f"train.fused=liger needs the package liger-kernel ({error}); run: pip install 'liger-kernel>=0.8', or use "
            "train.fused=compile."
        ) from error
    name = model.config.model_type
    if name not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"train.fused=liger: liger-kernel has nothing for {name}; use train.fused=compile.")
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[name]
    known = inspect.signature(apply).parameters
    source = vars(sys.modules[type(model).__module__])
    before = dict(source)
    # Tables such as that of activations, which all models share; some make what they are asked for.
    tables = [
        (value, dict(dict.items(value)))
        for name, value in before.items()
        if isinstance(value, dict) and not name.startswith("__")
    ]
    try:
        apply(model=model, **{part: on for part, on in _LIGER_PARTS.items() if part in known})
        replaced = {key: value for key, value in source.items() if before.get(key) is not value}
    finally:
        source.update(before)
        for value, contents in tables:
            if dict(dict.items(value)) != contents:
                value.clear()
                value.update(contents)
    functions = {key: value for key, value in replaced.items() if inspect.isfunction(value)}
    for _, attention in attention_modules(model):
        forward = inspect.unwrap(type(attention).forward)
        unread = [key for key in functions if key not in forward.__code__.co_names]
        if unread:
            raise UserError(
                f"train.fused=liger: the attention of {name} does not call {', '.join(unread)}, which liger-kernel "
                "replaces; use train.fused=compile."
            )
        bound = types.FunctionType(
            forward.__code__,
            {**forward.__globals__, **functions},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        bound.__kwdefaults__ = forward.__kwdefaults__
        attention.forward = types.MethodType(bound, attention)
