"""Linear cross entropy in chunks of tokens: the (tokens, vocabulary) logits never exist.

At 512K tokens and 152K words the logits alone would be 300 GiB in fp32. The loss is the last operation of a
step, so the gradients of a chunk are computed in the forward pass while its logits are at hand, instead of a
second time in backward; what is kept is one gradient of the hidden states and one of the weight.

So there are three products a chunk, none of them twice, and between the first and the others the logits become their
own gradient in place. Compiled, that reads them twice or thrice and writes them once: 8 bytes a logit, where products
of hidden size 2048 compute 12 kFLOP. Eager, it is about 50 bytes, on an H200 two thirds of the products' time. The
weight's gradient is read and written whole for each chunk: chunks of a few thousand tokens make that cheap too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtraining.model.fused import compiled_whole

IGNORED = -100
"""The label of a token that is not trained on."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and of sums: fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token, 0 where ignored, in the wide dtype."""
    lse = torch.logsumexp(logits.to(_wide(logits.dtype)), dim=-1)
    return torch.where(labels != IGNORED, lse - _at_label(logits, labels), 0.0)


def _at_label(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each token's label, any where it is ignored."""
    return logits.gather(-1, labels.clamp_min(0)[:, None])[:, 0]


def _softmax_in_place(logits: Tensor, labels: Tensor, at_label: Tensor) -> Tensor:
    """Token losses; ``logits`` become their softmax, and 0 for ignored tokens.

    ``at_label`` was read from the logits apart: compiled together with what writes over them, PyTorch 2.11's inductor
    reads it afterwards on a CPU.
    """
    wide = logits.to(_wide(logits.dtype))
    lse = torch.logsumexp(wide, dim=-1)
    ignored = labels == IGNORED
    logits.copy_(wide.sub_(lse[:, None]).exp_().masked_fill_(ignored[:, None], 0.0))
    return torch.where(ignored, 0.0, lse - at_label)


def _less_onehot(softmax: Tensor, losses: Tensor, labels: Tensor) -> None:
    """From softmax to d loss / d logits, in place; apart from it, for compiled together they need a second buffer."""
    at_label = torch.where(labels != IGNORED, (-losses).exp() - 1, 0.0).to(softmax.dtype)
    softmax.scatter_(-1, labels.clamp_min(0)[:, None], at_label[:, None])


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled_whole(function, "the loss")


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk: int,
        with_grad: bool,
        compiled: bool,
    ) -> Tensor:
        hidden_needed, weight_needed = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        softmax_in_place = _compiled(_softmax_in_place) if compiled else _softmax_in_place
        total = hidden.new_zeros((), dtype=_wide(hidden.dtype))
        d_hidden = torch.empty_like(hidden) if hidden_needed else None
        d_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype)) if weight_needed else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.T
            if d_hidden is None and d_weight is None:
                total += _token_losses(logits, labels[rows]).sum()
                continue
            losses = softmax_in_place(logits, labels[rows], _at_label(logits, labels[rows]))
            total += losses.sum()
            _less_onehot(logits, losses, labels[rows])
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                _add_product(d_weight, logits.T, hidden[rows])
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the dtype of ``total``; a GPU does not round the product to that of ``a`` on the way."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += a @ b


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_labels: int | Tensor,
    chunk: int = 8192,
    compiled: bool = False,
) -> Tensor:
    """Sum of the token losses over all labels that are not -100, divided by ``num_labels``.

    Args:
        hidden: (..., hidden size), the decoder's output.
        weight: (vocabulary, hidden size), of lm_head.
        labels: (...) int64, already shifted; -100 is ignored.
        num_labels: the count to divide by: the *global* one when the tokens are spread over ranks.
        chunk: tokens whose logits exist at one time; memory is 2 bytes (bf16) * chunk * vocabulary when compiled, and
            about 8 more in eager mode.
        compiled: fuse the softmax and its gradient by torch.compile, once for each size of a chunk.

    Returns:
        Scalar in fp32 (fp64 for fp64 inputs). Differentiable once, in ``hidden`` and ``weight``.
    """
    total = _ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        chunk,
        torch.is_grad_enabled(),
        compiled,
    )
    return total / num_labels


@torch.no_grad()
def chunked_token_scores(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 8192) -> Tensor:
    """The loss of each token, and whether its label is what greedy decoding would have taken. No gradient.

    Returns:
        (2, ...) with ``labels``' shape, fp32 (fp64 for fp64 inputs): losses, 0 where ignored; and 1 where the label has
        the largest logit (the first of equals), else 0.
    """
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    parts = []
    for start in range(0, flat.shape[0], chunk):
        logits, rows = flat[start : start + chunk] @ weight.T, flat_labels[start : start + chunk]
        losses = _token_losses(logits, rows)
        parts.append(torch.stack([losses, (logits.argmax(-1) == rows).to(losses.dtype)]))
    return torch.cat(parts, 1).view(2, *labels.shape)


@torch.no_grad()
def chunked_token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 8192) -> Tensor:
    """The loss of each token, shaped like ``labels``, fp32 (fp64 for fp64 inputs), 0 where ignored. No gradient."""
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    parts = [
        _token_losses(flat[start : start + chunk] @ weight.T, flat_labels[start : start + chunk])
        for start in range(0, flat.shape[0], chunk)
    ]
    return torch.cat(parts).view(labels.shape)
