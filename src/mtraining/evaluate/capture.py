"""Queries and keys of a real model under dense attention, handed to a visitor layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mtraining.errors import UserError
from mtraining.model.support import decoder_of

Visitor = Callable[[int, Tensor, Tensor, float], None]
_NAME = "mtraining_capture"


@torch.no_grad()
def visit_attention(hf_model: Any, input_ids: Tensor, visitor: Visitor) -> None:
    """Run the model's decoder once with exact attention and show every layer's queries and keys to ``visitor``.

    Nothing is kept, so a long sequence needs the memory of one layer.

    Args:
        hf_model: a transformers causal language model, not yet parallelised; left as it was.
        input_ids: int64 (batch, tokens).
        visitor: called with layer, q (batch, tokens, q_heads, head_dim), k (batch, tokens, kv_heads, head_dim), both
            after rotary embedding, and the scale of their product.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if options.get("s_aux") is not None or options.get("sliding_window") is not None:
            raise UserError(
                f"model: {hf_model.config.model_type} has attention sinks or a sliding window, which calibration does "
                "not compute; calibrate another model, or choose a pattern without a table."
            )
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        visitor(int(module.layer_idx), query.transpose(1, 2), key.transpose(1, 2), float(scale))  # type: ignore[arg-type]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(_NAME, attention)
    before, training = hf_model.config._attn_implementation, hf_model.training
    hf_model.set_attn_implementation(_NAME)
    hf_model.eval()  # what is looked at is without dropout
    try:
        decoder_of(hf_model)(input_ids=input_ids, use_cache=False)
    finally:
        hf_model.set_attn_implementation(before)
        hf_model.train(training)
