"""Layer recompute: what each decoder layer keeps between forward and backward, and where."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from mtraining.errors import UserError
from mtraining.model.offload import Kept, OffloadedTape, make_offloader
from mtraining.model.products import MLP, PROJECTIONS, ProductTape, mark_products
from mtraining.model.support import layers_of
from mtraining.ring import IndexTape

ATTENTION = "attention"
PARTS = (ATTENTION, PROJECTIONS, MLP)
"""What a layer may keep beside its input: attention's outputs, the products in its attention module (queries, keys,
values, and what follows attention), and those of its MLP."""
RECOMPUTE = ("full", "keep_attention", "none")
"""The same for all layers. `auto` chooses for each layer (`mtraining.predict.recompute`)."""


@dataclass(frozen=True)
class LayerPolicy:
    """What one layer keeps between forward and backward.

    Attributes:
        parts: kept beside the layer's input, of `PARTS`; the rest is recomputed.
        everything: nothing is recomputed.
        offload: the layer's input and attention's outputs wait in pinned host memory.
    """

    parts: frozenset[str] = frozenset()
    everything: bool = False
    offload: bool = False

    def __repr__(self) -> str:
        """The parts in the order of `PARTS`: a set's own order differs from process to process."""
        parts = [part for part in PARTS if part in self.parts] + sorted(self.parts - set(PARTS))
        return f"LayerPolicy(parts={parts}, everything={self.everything}, offload={self.offload})"


_POLICIES = {
    "full": LayerPolicy(),
    "keep_attention": LayerPolicy(frozenset({ATTENTION})),
    "none": LayerPolicy(everything=True),
}


def layer_policies(recompute: str | Sequence[LayerPolicy], offload: bool, layers: int) -> list[LayerPolicy]:
    """The policy of each of so many layers.

    Args:
        recompute: one of `RECOMPUTE`, or the policies themselves.
        offload: what recompute keeps goes to pinned host memory; of all layers but the last, whose backward is first.

    Raises:
        UserError: an unknown name, policies for other layers, or nothing to offload.
    """
    if not isinstance(recompute, str):
        if len(recompute) != layers:
            raise UserError(f"recompute: {len(recompute)} policies for {layers} layers; give one for each.")
        if offload:
            raise UserError("offload: each layer's policy says whether it offloads; leave offload out.")
        return list(recompute)
    if recompute == "auto":
        raise UserError(
            "recompute='auto' needs the step's memory, which parallelize does not know; use mtraining train or "
            "ContextParallelTrainer, or give the policies of mtraining.predict.recompute.choose_policies."
        )
    if recompute not in RECOMPUTE:
        raise UserError(f"recompute: {recompute!r} is not known; choose one of {', '.join(RECOMPUTE)}.")
    if offload and recompute == "none":
        raise UserError(
            "train.offload moves what recompute keeps, and train.recompute=none keeps everything; set "
            "train.recompute to full or keep_attention, or train.offload to false."
        )
    policy = _POLICIES[recompute]
    away = LayerPolicy(policy.parts, policy.everything, offload)
    return [away] * (layers - 1) + [policy]


def runs(policies: Sequence[LayerPolicy]) -> list[tuple[int, int, LayerPolicy]]:
    """(first layer, last layer, their policy) of every run of layers with one policy."""
    found: list[tuple[int, int, LayerPolicy]] = []
    for number, policy in enumerate(policies):
        if found and found[-1][2] == policy:
            found[-1] = (found[-1][0], number, policy)
        else:
            found.append((number, number, policy))
    return found


def recompute_layers(
    model: Any, policies: Sequence[LayerPolicy], device: torch.device, fused: str = "none"
) -> None:
    """Wrap the forward of every decoder layer, in place.

    The wrapper sits on the instance's forward, inside the FSDP hooks: parameters are gathered once around
    the recompute, and no name in the state dict changes.

    Args:
        model: a transformers causal language model that `check_supported` accepts.
        policies: of each layer.
        device: where the model will run.
        fused: as `mtraining.model.fused.fuse` was told.

    Raises:
        UserError: products that are to be kept inside compiled layers.
    """
    layers = layers_of(model)
    if any(policy.parts & {PROJECTIONS, MLP} for policy in policies):
        if fused == "compile":
            raise UserError(
                "recompute: compiled layers keep attention's outputs or everything, not single products; use "
                "train.fused=liger or train.fused=none."
            )
        mark_products(model)
    offloader = make_offloader(device) if any(policy.offload for policy in policies) else None
    # liger-kernel's rotary embedding overwrites queries and keys.
    copied = frozenset({PROJECTIONS}) if fused == "liger" else frozenset()
    for index, (layer, policy) in enumerate(zip(layers, policies, strict=True)):
        if policy.everything:
            continue
        keeper = None if offloader is None else functools.partial(offloader.layer, index, not policy.offload)
        layer.forward = _recomputed(layer.forward, policy.parts, copied, keeper)


def _recomputed(
    forward: Callable[..., Any],
    parts: frozenset[str],
    copied: frozenset[str],
    keeper: Callable[[], Kept] | None,
) -> Callable[..., Any]:
    """``forward`` with its activations recomputed in backward, replaying the attention index of the first pass."""
    keep_outputs = ATTENTION in parts

    def contexts(kept: Kept | None) -> tuple[Any, Any]:
        tape = OffloadedTape(kept) if keep_outputs and kept is not None else IndexTape(keep_outputs)
        products = ProductTape(parts, copied)
        return _both(tape.record, products.record), _both(tape.replay, products.replay)

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            return checkpoint(forward, *args, use_reentrant=False, context_fn=_refuse, **kwargs)
        kept = None if keeper is None else keeper()
        first = _FirstPass(forward)
        with kept.hooks() if kept is not None else nullcontext():
            result = checkpoint(
                first, *args, use_reentrant=False, context_fn=lambda: contexts(kept), **kwargs
            )
        first.raise_failure()
        return result

    return wrapper


class _FirstPass:
    """``forward`` for `checkpoint`, which before torch 2.13 does not leave its contexts when the first pass fails.

    They stay in force for as long as the error's traceback exists: what this thread saves for backward then belongs to
    the failed layer, whoever saves it. So the first pass returns, and its error is raised once checkpoint is left.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._ran = False
        self._failure: list[BaseException] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._ran:  # recompute, which ends early by an exception of checkpoint's own
            return self._forward(*args, **kwargs)
        self._ran = True
        try:
            return self._forward(*args, **kwargs)
        except BaseException as error:
            self._failure.append(error)
            return None

    def raise_failure(self) -> None:
        """Raise the error of the first pass, if it failed, and hold it no longer."""
        if self._failure:
            raise self._failure.pop()


@contextmanager
def _both(*entered: Callable[[], Any]) -> Any:
    with ExitStack() as stack:
        for one in entered:
            stack.enter_context(one())
        yield


def _refuse() -> tuple[Any, Any]:
    """Called by the compiler; an error raised anywhere else would only make it leave this frame uncompiled."""
    raise UserError(
        "recompute: compiled code cannot contain it; let parallelize compile the layers inside it "
        "(fused='compile'), or use recompute='none'."
    )
