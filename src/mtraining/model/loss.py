"""Linear cross entropy in chunks of tokens: the (tokens, vocabulary) logits never exist.

At 512K tokens and 152K words the logits alone would be 300 GiB in fp32. The loss is the last operation of a
step, so the gradients of a chunk are computed in the forward pass while its logits are at hand, instead of a
second time in backward; what is kept is one gradient of the hidden states and one of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that is not trained on."""


def _losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token losses (0 where ignored), logits, their logsumexp, and which labels count; fp32 (fp64 for fp64 inputs)."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    lse = torch.logsumexp(logits, dim=-1)
    counted = labels != IGNORED
    target = logits.gather(-1, labels.clamp_min(0)[:, None])[:, 0]
    return torch.where(counted, lse - target, 0.0), logits, lse, counted


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, with_grad: bool
    ) -> Tensor:
        hidden_needed, weight_needed = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.empty_like(hidden) if hidden_needed else None
        d_weight = torch.zeros_like(weight, dtype=wide) if weight_needed else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            losses, logits, lse, counted = _losses(hidden[rows], weight, labels[rows])
            total += losses.sum()
            if d_hidden is None and d_weight is None:
                continue
            # d loss / d logits = softmax - onehot, for the tokens that count; built in the memory of the logits.
            d_logits = logits.sub_(lse[:, None]).exp_()
            d_logits.scatter_add_(
                -1, labels[rows].clamp_min(0)[:, None], d_logits.new_full((len(lse), 1), -1.0)
            )
            d_logits = d_logits.masked_fill_(~counted[:, None], 0.0).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (grad,) = grads
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_labels: int | Tensor, chunk: int = 2048
) -> Tensor:
    """Sum of the token losses over all labels that are not -100, divided by ``num_labels``.

    Args:
        hidden: (..., hidden size), the decoder's output.
        weight: (vocabulary, hidden size), of lm_head.
        labels: (...) int64, already shifted; -100 is ignored.
        num_labels: the count to divide by: the *global* one when the tokens are spread over ranks.
        chunk: tokens whose logits exist at one time; memory is about 3 * 4 * chunk * vocabulary bytes.

    Returns:
        Scalar in fp32 (fp64 for fp64 inputs). Differentiable once, in ``hidden`` and ``weight``.
    """
    total = _ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), chunk, torch.is_grad_enabled()
    )
    return total / num_labels


@torch.no_grad()
def chunked_token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 2048) -> Tensor:
    """The loss of each token, shaped like ``labels``, fp32 (fp64 for fp64 inputs), 0 where ignored. No gradient."""
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    parts = [
        _losses(flat[start : start + chunk], weight, flat_labels[start : start + chunk])[0]
        for start in range(0, flat.shape[0], chunk)
    ]
    return torch.cat(parts).view(labels.shape)
