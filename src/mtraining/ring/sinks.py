"""Attention sinks: a learned logit for each head that takes part in the softmax and has no value.

With a sink z, softmax runs over the scores of a row and z. Given out and lse of the scores alone,

    lse' = log(exp(lse) + exp(z))        out' = out * exp(lse - lse') = out * sigmoid(lse - z)

are the attention with the sink: a key more, whose value is zero. So backward over the real keys needs nothing new. It
takes out' and lse' for out and lse, as it takes those of a row with more keys. The sink's own probability is
exp(z - lse'). Its value is zero, so the gradient of z is -exp(z - lse') * rowsum(dout * out'), summed over rows.

Source: gpt-oss (arXiv 2508.10925), and attention with a learned denominator in StreamingLLM (arXiv 2309.17453).
"""

from __future__ import annotations

from torch import Tensor, logaddexp


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with one sink for each head, from attention without; ``out`` is written over.

    Args:
        out: (batch, rows, heads, head_dim).
        lse: (batch, heads, rows), natural log; -inf where a row sees no key, and out = 0.
        sinks: (heads,), in any dtype.

    Returns:
        out and lse, in their dtypes.
    """
    joined = logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return out.mul_((lse - joined).exp().transpose(1, 2)[..., None]), joined


def sinks_gradient(delta: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of ``sinks``, (heads,) in their dtype: this process's rows.

    Args:
        delta: rowsum(dout * out), (batch, heads, rows), of the out with sinks.
        lse: (batch, heads, rows), with sinks.
    """
    probability = (sinks.to(lse.dtype)[:, None] - lse).exp()
    return -(probability * delta).sum((0, 2)).to(sinks.dtype)
