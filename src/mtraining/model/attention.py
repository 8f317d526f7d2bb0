"""The bridge from a transformers model to the ring: one attention function, named "mtraining".

What a layer needs to attend (pattern, layout, mesh, kernel) hangs on its attention module, so two models in
one process never see each other's settings.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from mtraining.errors import UserError
from mtraining.model.windows import refuse_other_window

ATTENTION_NAME = "mtraining"


class BoundAttention(Protocol):
    """Attention with its settings bound: :class:`mtraining.ring.AttentionRuntime`, or what stands in for it."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """(batch, local tokens, heads, head_dim), three times, and sinks (q_heads,) -> the same shape as q."""
        ...


def attach(module: nn.Module, runtime: BoundAttention) -> None:
    """Give an attention module its runtime."""
    module.mtraining_runtime = runtime  # type: ignore[assignment]


def sparse_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: local shards in, local shard out.

    Args:
        module: the attention module, after `attach`.
        query: (batch, q_heads, local tokens, head_dim), rotated by its global positions.
        key, value: (batch, kv_heads, local tokens, head_dim).
        attention_mask: must be None; causality is by global position.
        scaling: softmax scale; None is head_dim ** -0.5.
        sliding_window: what the layer asks for: the window that its config gives it, which its runtime honours.
        s_aux: attention sinks, (q_heads,): logits that take part in each row's softmax and have no value.

    Returns:
        (batch, local tokens, q_heads, head_dim) in query's dtype, contiguous, and None for the weights, which never
        exist.

    Raises:
        UserError: something is asked that sparse attention would not honour.
    """
    runtime: BoundAttention | None = getattr(module, "mtraining_runtime", None)
    if runtime is None:
        raise UserError(
            'attention "mtraining" needs a model prepared by mtraining.parallelize; call it first.'
        )
    refused = {
        "an attention mask": attention_mask is not None,
        "attention dropout": dropout != 0.0,
        "soft-capping": softcap is not None,
        "non-causal attention": is_causal is False,
        "a key-value cache": query.shape[-2] != key.shape[-2],
        "a value size other than head_dim": query.shape[-1] != value.shape[-1],
    }
    for what, present in refused.items():
        if present:
            raise UserError(
                f"model: this forward asks for {what}, which sparse attention does not honour; remove it."
            )
    refuse_other_window(getattr(module, "mtraining_window", None), sliding_window)
    out = runtime(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scaling, s_aux)
    return out.contiguous(), None  # as transformers' own leave it, since some models take a view


def refuse_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before the decoder's forward: transformers would drop a padding mask in silence.

    It builds no mask for an attention that has no mask function. One registered to refuse masks would be asked too
    late: transformers first looks for packed documents in the position ids, which waits for the device, and takes the
    jumps in a rank's striped positions for some.
    """
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is not None:
        raise UserError(
            "model: attention_mask is not supported; pass whole sequences and mark padding by labels of -100."
        )


AttentionInterface.register(ATTENTION_NAME, sparse_attention)
