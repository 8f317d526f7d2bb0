"""Queries and keys of a real model under dense attention, handed to a visitor layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mtraining.kernel import Window
from mtraining.model.support import decoder_of, layers_of
from mtraining.model.windows import band, refuse_other_window, windows_of
from mtraining.pattern import Dense
from mtraining.ring import sparse_ring_attention

Visitor = Callable[[int, Tensor, Tensor, float], None]
WindowVisitor = Callable[[int, Tensor, Tensor, float, Window], None]
_NAME = "mtraining_capture"
_BLOCK = 128  # of layers with windows or sinks, which pad to it


@torch.no_grad()
def visit_attention(
    hf_model: Any, input_ids: Tensor, visitor: Visitor, windowed: WindowVisitor | None = None
) -> None:
    """Run the model's decoder once with exact attention, and show queries and keys of its layers to ``visitor``.

    No pattern chooses in layers with a window, so those are shown to ``windowed``, if at all. Attention sinks take part
    in what the layers compute, and not in what is shown.

    Nothing is kept, so a long sequence needs the memory of one layer.

    Args:
        hf_model: a transformers causal language model, not yet parallelised; left as it was.
        input_ids: int64 (batch, tokens).
        visitor: called with layer, q (batch, tokens, q_heads, head_dim), k (batch, tokens, kv_heads, head_dim), both
            after rotary embedding, and the scale of their product.
        windowed: the same for layers with a window, which is its last argument.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        layer, sinks = int(module.layer_idx), options.get("s_aux")  # type: ignore[arg-type]
        window = windows[layer]
        refuse_other_window(window, options.get("sliding_window"))
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if window is None:
            visitor(layer, q, k, float(scale))
            if sinks is None:
                return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        elif windowed is not None:
            windowed(layer, q, k, float(scale), window)
        # transformers' own here has no masks of windows, and leaves sinks out.
        padding = -q.shape[1] % _BLOCK
        q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
        out = sparse_ring_attention(
            q, k, v, pattern=Dense(_BLOCK) if window is None else band(window, _BLOCK), layout="contiguous", mesh=None,
            scale=float(scale), padding=padding, window=window, sinks=sinks,
        )  # fmt: skip
        return out[:, : query.shape[2]], None

    windows = windows_of(hf_model.config, len(layers_of(hf_model)))
    AttentionInterface.register(_NAME, attention)
    before, training = hf_model.config._attn_implementation, hf_model.training
    hf_model.set_attn_implementation(_NAME)
    hf_model.eval()  # what is looked at is without dropout
    try:
        decoder_of(hf_model)(input_ids=input_ids, use_cache=False)
    finally:
        hf_model.set_attn_implementation(before)
        hf_model.train(training)
