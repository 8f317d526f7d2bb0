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

from mtraining.errors import UserError
from mtraining.model.fused import compiled_whole
from mtraining.model.logits import PLAIN, Head, LogitForm, product, shaped, wide

IGNORED = -100
"""The label of a token that is not trained on."""


def on_host(x: Tensor) -> bool:
    """Whether the values of ``x`` can be looked at without waiting for a device or cutting a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def unknown_labels(labels: Tensor, words: int) -> Tensor:
    """bool like ``labels``: neither ignored nor a word of a vocabulary of this many."""
    return (labels != IGNORED) & ((labels < 0) | (labels >= words))


def refuse_labels(labels: Tensor, words: int) -> None:
    """Refuse labels that are neither ignored nor in the vocabulary, where to look at them waits for no device.

    Elsewhere (on a GPU, in compiled code) the loss of such a label is NaN, and so are its gradients.

    Raises:
        UserError: labels on a CPU, naming the first one at fault.
    """
    if not on_host(labels):
        return
    unknown = labels[unknown_labels(labels, words)]
    if unknown.numel():
        raise UserError(labels_sentence(unknown.numel(), words, int(unknown[0])))


def labels_sentence(count: int, words: int, example: int | None = None) -> str:
    """What is wrong with ``count`` labels, for a message."""
    such = "" if example is None else f" (such as {example})"
    return (
        f"labels: {count} of them{such} are neither {IGNORED}, which is ignored, nor among the model's {words} words, "
        f"0 to {words - 1}; mark tokens without a label by {IGNORED}, and use the model's own tokenizer."
    )


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token, 0 where ignored; ``logits`` are in the wide dtype."""
    lse = torch.logsumexp(logits, dim=-1)
    return torch.where(labels != IGNORED, lse - _at_label(logits, labels), 0.0)


def _at_label(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each token's label: any where it is ignored, NaN where it is none of the vocabulary."""
    words = logits.shape[-1]
    found = logits.gather(-1, labels.clamp(0, words - 1)[:, None])[:, 0]
    return found.masked_fill(unknown_labels(labels, words), torch.nan)


def _softmax_in_place(
    logits: Tensor, labels: Tensor, at_label: Tensor, scale: float, cap: float | None
) -> Tensor:
    """Token losses; the head's product becomes the softmax of its logits, and 0 for ignored tokens.

    With a cap, each entry is also multiplied by the cap's derivative, 1 - (logit / cap)^2. The factor's own derivative
    is one for all, and waits for the end.

    ``at_label`` was read from the logits apart: compiled together with what writes over them, PyTorch 2.11's inductor
    reads it afterwards on a CPU.
    """
    full = shaped(logits, scale, cap)
    lse = torch.logsumexp(full, dim=-1)
    ignored = labels == IGNORED
    if cap is None:
        softmax = full.sub_(lse[:, None]).exp_()
    else:
        softmax = (full - lse[:, None]).exp_().mul_(1 - (full / cap).square_())
    logits.copy_(softmax.masked_fill_(ignored[:, None], 0.0))
    return torch.where(ignored, 0.0, lse - at_label)


def _nothing_but_losses(
    logits: Tensor, labels: Tensor, at_label: Tensor, scale: float, cap: float | None
) -> Tensor:
    """What `_softmax_in_place` allocates once it is compiled: it works in the logits alone."""
    return torch.empty_like(at_label)


def _less_onehot(
    softmax: Tensor, losses: Tensor, labels: Tensor, at_label: Tensor, cap: float | None
) -> None:
    """From softmax to d loss / d logits, in place; apart from it, for compiled together they need a second buffer."""
    slope = 1.0 if cap is None else 1 - (at_label / cap).square()
    entry = torch.where(labels != IGNORED, ((-losses).exp() - 1) * slope, 0.0).to(softmax.dtype)
    softmax.scatter_(-1, labels.clamp(0, softmax.shape[-1] - 1)[:, None], entry[:, None])


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled_whole(function, "the loss")


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        form: LogitForm,
        chunk: int,
        with_grad: bool,
        compiled: bool,
    ) -> Tensor:
        hidden_needed, weight_needed, bias_needed = (
            with_grad and needed for needed in ctx.needs_input_grad[:3]
        )
        softmax_in_place = _softmax_in_place
        if compiled:
            # Shapes alone cannot be compiled, and memory is predicted from them.
            softmax_in_place = _nothing_but_losses if hidden.is_meta else _compiled(_softmax_in_place)
        total = hidden.new_zeros((), dtype=wide(hidden.dtype))
        d_hidden = torch.empty_like(hidden) if hidden_needed else None
        d_weight = torch.zeros_like(weight, dtype=wide(weight.dtype)) if weight_needed else None
        d_bias = weight.new_zeros(weight.shape[0], dtype=wide(weight.dtype)) if bias_needed else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = product(hidden[rows], weight, bias)
            if d_hidden is None and d_weight is None and d_bias is None:
                total += _token_losses(form(logits), labels[rows]).sum()
                continue
            at_label = form(_at_label(logits, labels[rows]))
            losses = softmax_in_place(logits, labels[rows], at_label, form.scale, form.cap)
            total += losses.sum()
            _less_onehot(logits, losses, labels[rows], at_label, form.cap)
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[rows])
            if d_weight is not None:
                _add_product(d_weight, logits.T, hidden[rows])
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=d_bias.dtype)
            del logits  # or those of the next chunk are made beside them
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.weight_dtype, ctx.scale = weight.dtype, form.scale
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] * ctx.scale
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad.to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grad).to(ctx.weight_dtype)
        if d_bias is not None:
            d_bias = (d_bias * grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in the dtype of ``total``; a GPU does not round the product to that of ``a`` on the way."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    elif a.is_meta:  # stands for a GPU, whose operator PyTorch 2.11 has for real tensors only
        total += total.new_empty(a.shape[0], b.shape[1])
    else:
        total += a @ b


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_labels: int | Tensor,
    chunk: int = 8192,
    compiled: bool = False,
    *,
    bias: Tensor | None = None,
    form: LogitForm = PLAIN,
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
        bias: (vocabulary,), of lm_head; None for none.
        form: the factor and the soft cap of the logits.

    Returns:
        Scalar in fp32 (fp64 for fp64 inputs). Differentiable once, in ``hidden``, ``weight`` and ``bias``. Where labels
        are on a GPU, one that is neither -100 nor in 0 .. vocabulary - 1 makes it NaN, with its gradients: to look at
        labels there would wait for the device.

    Raises:
        UserError: such a label on a CPU.
    """
    refuse_labels(labels, weight.shape[0])
    total = _ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        form,
        chunk,
        torch.is_grad_enabled(),
        compiled,
    )
    return total / num_labels


@torch.no_grad()
def chunked_token_scores(hidden: Tensor, head: Head, labels: Tensor, chunk: int = 8192) -> Tensor:
    """The loss of each token, and whether its label is what greedy decoding would have taken. No gradient.

    Returns:
        (2, ...) with ``labels``' shape, fp32 (fp64 for fp64 inputs): losses, 0 where ignored; and 1 where the label has
        the largest logit (the first of equals), else 0.

    Labels outside of the vocabulary are treated as :func:`chunked_cross_entropy` does.
    """

    def scores(logits: Tensor, rows: Tensor) -> Tensor:
        losses = _token_losses(logits, rows)
        return torch.stack([losses, (logits.argmax(-1) == rows).to(losses.dtype)])

    return torch.cat(_of_chunks(scores, hidden, head, labels, chunk), 1).view(2, *labels.shape)


@torch.no_grad()
def chunked_token_losses(hidden: Tensor, head: Head, labels: Tensor, chunk: int = 8192) -> Tensor:
    """The loss of each token, shaped like ``labels``, fp32 (fp64 for fp64 inputs), 0 where ignored. No gradient.

    Labels outside of the vocabulary are treated as :func:`chunked_cross_entropy` does.
    """
    return torch.cat(_of_chunks(_token_losses, hidden, head, labels, chunk)).view(labels.shape)


def _of_chunks(
    function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, head: Head, labels: Tensor, chunk: int
) -> list[Tensor]:
    """``function`` of some tokens' logits, in the wide dtype, and labels. Logits of two chunks never exist together."""
    refuse_labels(labels, head.weight.shape[0])
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    starts = range(0, flat.shape[0], chunk)
    return [
        function(head.logits(flat[start : start + chunk]), flat_labels[start : start + chunk])
        for start in starts
    ]
