"""Layer recompute: what each decoder layer keeps between forward and backward, and where."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from mtraining.errors import UserError
from mtraining.model.offload import Kept, OffloadedTape, make_offloader
from mtraining.model.support import layers_of
from mtraining.ring import IndexTape

RECOMPUTE = ("full", "keep_attention", "none")


def recompute_layers(model: Any, mode: str, offload: bool, device: torch.device) -> None:
    """Wrap the forward of every decoder layer, in place.

    The wrapper sits on the instance's forward, inside the FSDP hooks: parameters are gathered once around
    the recompute, and no name in the state dict changes.

    Args:
        model: a transformers causal language model that `check_supported` accepts.
        mode: one of `RECOMPUTE`.
        offload: what the layers keep goes to pinned host memory between forward and backward.
        device: where the model will run.

    Raises:
        UserError: an unknown mode, or nothing to offload.
    """
    if mode not in RECOMPUTE:
        raise UserError(f"recompute: {mode!r} is not known; choose one of {', '.join(RECOMPUTE)}.")
    if offload and mode == "none":
        raise UserError(
            "train.offload moves what recompute keeps, and train.recompute=none keeps everything; set "
            "train.recompute to full or keep_attention, or train.offload to false."
        )
    if mode == "none":
        return
    layers = layers_of(model)
    offloader = make_offloader(len(layers), device) if offload else None
    for index, layer in enumerate(layers):
        keeper = functools.partial(offloader.layer, index) if offloader is not None else lambda: None
        layer.forward = _recomputed(layer.forward, mode == "keep_attention", keeper)


def _recomputed(
    forward: Callable[..., Any], keep_outputs: bool, keeper: Callable[[], Kept | None]
) -> Callable[..., Any]:
    """``forward`` with its activations recomputed in backward, replaying the attention index of the first pass."""

    def contexts(kept: Kept | None) -> tuple[Any, Any]:
        tape = OffloadedTape(kept) if keep_outputs and kept is not None else IndexTape(keep_outputs)
        return tape.record(), tape.replay()

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            return checkpoint(forward, *args, use_reentrant=False, context_fn=_refuse, **kwargs)
        kept = keeper()
        with kept.hooks() if kept is not None else nullcontext():
            return checkpoint(
                forward, *args, use_reentrant=False, context_fn=lambda: contexts(kept), **kwargs
            )

    return wrapper


def _refuse() -> tuple[Any, Any]:
    """Called by the compiler; an error raised anywhere else would only make it leave this frame uncompiled."""
    raise UserError(
        "recompute: compiled code cannot contain it; let parallelize compile the layers inside it "
        "(fused='compile'), or use recompute='none'."
    )
