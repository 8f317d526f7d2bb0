"""Which layers of a model have a sliding window or attend within chunks, as its config says.

A window's index is known without an estimate: the block diagonals that it touches, cut to the token by starts
(:mod:`mtraining.kernel.starts`). So such layers have no pattern to choose, and nothing of theirs is held, covered or
counted over steps. What the config says is compared with what each layer asks of its attention function, in every
forward (`mtraining.model.attention`).
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from mtraining.errors import UserError
from mtraining.kernel import Chunks, Window, reach_of
from mtraining.pattern import AShape, Pattern

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
_KINDS = {
    "linear_attention": "linear attention or a state space",
    "conv": "a convolution in place of attention",
    "hybrid": "a state space beside attention",
    "mamba": "a state space",
    "recurrent": "a recurrence",
    "moe": "no attention",
}
"""In words, what layers do that `layer_types` names so; other names speak for themselves."""


def windows_of(config: Any, layers: int) -> tuple[Window | None, ...]:
    """The window of each layer, None for full attention.

    Where layers have types, ``sliding_attention`` takes the config's ``sliding_window``, and ``chunked_attention`` its
    ``attention_chunk_size``. transformers makes the types of ``use_sliding_window`` and ``max_window_layers``. Without
    types, a ``sliding_window`` is that of every layer, as in Mistral's first models.

    Args:
        config: a transformers ``PreTrainedConfig`` of a causal language model.
        layers: of the model.

    Raises:
        UserError: layers that are neither, or a window without a size.
    """
    name = config.model_type
    kinds = getattr(config, "layer_types", None)
    sliding, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if not kinds:
        if chunk:
            raise UserError(
                f"model: {name} has attention within chunks (attention_chunk_size={chunk}) and does not say in which "
                "layers (layer_types); use a model that does."
            )
        used = sliding is not None and getattr(config, "use_sliding_window", True)
        return (_checked(name, sliding) if used else None,) * layers
    found: list[Window | None] = []
    for kind in kinds[:layers]:
        if kind == FULL:
            found.append(None)
        elif kind == SLIDING:
            if sliding is None:
                raise UserError(
                    f"model: {name} has layers of sliding-window attention (layer_types contains {kind!r}) and no "
                    "sliding_window; set it to a number of tokens."
                )
            found.append(_checked(name, sliding))
        elif kind == CHUNKED:
            if not chunk:
                raise UserError(
                    f"model: {name} has layers of attention within chunks (layer_types contains {kind!r}) and no "
                    "attention_chunk_size; set it to a number of tokens."
                )
            found.append(Chunks(int(chunk)))
        else:
            raise UserError(
                f"model: {name} has layers of {_KINDS.get(kind, kind.replace('_', ' '))} (layer_types contains "
                f"{kind!r}), which the sparse path does not honour; use a model whose layers have full attention, "
                "sliding windows or chunks."
            )
    if len(found) != layers:
        raise UserError(
            f"model: {name} has {layers} layers and {len(found)} layer_types; give a type to each layer."
        )
    return tuple(found)


def check_windows(config: Any) -> None:
    """Refuse layers that are neither full attention, nor sliding windows, nor chunks.

    Raises:
        UserError: names the layers and the field.
    """
    windows_of(config, len(getattr(config, "layer_types", None) or ()))


def _checked(name: str, window: Any) -> int:
    if not isinstance(window, int) or window < 1:
        raise UserError(
            f"model: {name} has sliding_window={window!r}, which is no number of tokens; set it to at least 1."
        )
    return window


def in_words(window: Window) -> str:
    """For sentences."""
    if isinstance(window, Chunks):
        return f"chunks of {window.tokens} tokens"
    return f"a sliding window of {window} tokens"


def band(window: Window, block_size: int) -> Pattern:
    """All block diagonals that a window touches."""
    return AShape(block_size=block_size, sinks=0, window=reach_of(window))


def bind_window(module: nn.Module, window: Window | None) -> None:
    """Tell an attention module's forward which window it must ask for."""
    module.mtraining_window = window  # type: ignore[assignment]


def check_asked(name: str, layer: int, module: nn.Module, window: Window | None) -> None:
    """Refuse a layer whose code never asks for the window that its config has: transformers computes full attention.

    Raises:
        UserError: naming the layer.
    """
    code = inspect.unwrap(type(module).forward).__code__
    # The names of keyword arguments stand together among the constants.
    named = {name for const in code.co_consts if isinstance(const, tuple) for name in const}
    if isinstance(window, int) and "sliding_window" not in named.union(code.co_names):
        raise UserError(
            f"model: {name} has {in_words(window)} in its config, and the code of layer {layer} never asks for one; "
            "use a model that computes what its config says."
        )


def refuse_other_window(window: Window | None, asked: int | None) -> None:
    """Refuse a forward that asks for another window than the config gives its layer.

    Chunks are a matter of masks alone: a layer asks for none.

    Raises:
        UserError: naming both.
    """
    expected = window if isinstance(window, int) else None
    if asked != expected:
        words = "no sliding window" if asked is None else in_words(asked)
        told = "full attention" if window is None else in_words(window)
        raise UserError(
            f"model: a layer's forward asks for {words} where model.config (layer_types, sliding_window, "
            f"use_sliding_window) gives it {told}; correct model.config."
        )
