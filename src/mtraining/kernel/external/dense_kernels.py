"""Dense attention kernels as a ring needs them: partial results and lse, gradients under the *global* lse and delta.

Each computes delta = rowsum(dout * out) itself, from an ``out`` that in a ring is not the one of this call; what it is
given instead is said with each.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel.reference.attention import accumulation_dtype

_HALF = (torch.bfloat16, torch.float16)
_sdpa = torch.ops.aten


class DenseKernel(Protocol):
    """Attention of every query over every key, or ``causal`` over as many keys as queries.

    q, dout (batch, rows, q_heads, head_dim); k, v (batch, keys, kv_heads, head_dim); lse and delta (batch, q_heads,
    rows) contiguous, in the accumulation dtype. Of batch more than one, the tensors may be slices along rows.
    """

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """out like q, in q's dtype or a wider one; lse (batch, q_heads, rows), contiguous."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """This call's share of dq, dk and dv, in q's dtype or a wider one."""
        ...


class Flash4Dense:
    """flash-attn-4, which takes a gradient of lse: with a zero ``out`` and dlse = -delta it has the global delta.

    Gradients are added in no fixed order unless PyTorch is asked for deterministic algorithms.
    """

    name = "flash4"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash4_interface()._flash_attn_fwd(
            q, k, v, softmax_scale=scale, causal=causal, return_lse=True
        )
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        zero = torch.zeros(q.shape[-1], dtype=q.dtype, device=q.device).expand(q.shape)
        dq, dk, dv = flash4_interface()._flash_attn_bwd(
            q, k, v, zero, dout.to(q.dtype), lse, softmax_scale=scale, causal=causal, dlse=-delta,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv


class CudnnDense:
    """cuDNN's, through PyTorch's operators, with :func:`stand_in` for ``out``. Key heads need no expanding.

    PyTorch keeps its plans by the shapes and strides of q, k and v alone: here those of all others follow from them.
    """

    name = "cudnn"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _sdpa._scaled_dot_product_cudnn_attention(
            *_heads_first(q, k, v), None, True, 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse.reshape(lse.shape[:3]).contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if torch.are_deterministic_algorithms_enabled():
            raise UserError(
                "kernel: 'cudnn' adds gradients in no fixed order, and deterministic algorithms were asked for; "
                "use kernel=flash, or kernel=flash4 where flash-attn-4 is installed."
            )
        out, dout = stand_in(dout, delta).to(q.dtype), dout.to(q.dtype)
        no_seed = torch.empty((), dtype=torch.int64, device=q.device)
        grads = _sdpa._scaled_dot_product_cudnn_attention_backward(
            *_heads_first(dout, q, k, v, out), lse[..., None], no_seed, no_seed, None, None, None,
            q.shape[1], k.shape[1], 0.0, causal, scale=scale,
        )  # fmt: skip
        return _rows_first(grads)


class FlashDense:
    """PyTorch's own flash attention, with :func:`stand_in` for ``out``.

    FlashAttention-2 on a GPU. On the CPU its C++ twin, which has no groups of heads, so keys are expanded; it runs in
    the accumulation dtype and equals the reference.
    """

    name = "flash"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        if q.device.type == "cpu":
            out, lse = _sdpa._scaled_dot_product_flash_attention_for_cpu(
                *_heads_first(*_alike(q, k, v)), 0.0, causal, scale=scale
            )
        else:
            out, lse, *_ = _sdpa._scaled_dot_product_flash_attention(
                *_heads_first(q, k, v), 0.0, causal, False, scale=scale
            )
        return out.transpose(1, 2), lse.contiguous()

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        out = stand_in(dout, delta)
        if q.device.type == "cpu":
            wide, *qkv = _alike(dout, q, k, v)
            grads = _sdpa._scaled_dot_product_flash_attention_for_cpu_backward(
                *_heads_first(wide, *qkv, out), lse, 0.0, causal, scale=scale
            )
            dq, dk, dv = _rows_first(grads)
            return dq, *(x.unflatten(2, (k.shape[2], -1)).sum(3) for x in (dk, dv))
        no_seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = _sdpa._scaled_dot_product_flash_attention_backward(
            *_heads_first(dout.to(q.dtype), q, k, v, out.to(q.dtype)), lse, None, None, q.shape[1], k.shape[1],
            0.0, causal, no_seed, no_seed[0], scale=scale,
        )  # fmt: skip
        return _rows_first(grads)


def stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    """An ``out`` with rowsum(dout * out) = delta, for kernels that use it for nothing else.

    dout * delta / |dout|^2: the part of the true one along dout, so never longer than it. A sum of squares has no
    cancellation, so rounding this to bf16 disturbs delta less than rounding the true one does.

    Args:
        dout: (batch, rows, q_heads, head_dim).
        delta: (batch, q_heads, rows), in the accumulation dtype; zero where dout is.

    Returns:
        like dout, in the accumulation dtype.
    """
    size = dout.abs().amax(-1, keepdim=True).to(delta.dtype)
    size = torch.where(size == 0, 1.0, size)
    unit = dout / size  # the squares of small gradients would vanish
    square = torch.linalg.vector_norm(unit, dim=-1, keepdim=True).square()
    return unit.mul_(delta.transpose(1, 2)[..., None] / torch.where(square == 0, 1.0, size * square))


def half_precision_only(dtype: torch.dtype) -> str | None:
    """Why a kernel for 16-bit numbers cannot serve ``dtype``; None where it can."""
    return None if dtype in _HALF else f"takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"


def unsupported(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why "cudnn" or "flash" cannot serve such tensors, as a clause after its name; None where it can."""
    most = {"cudnn": 128, "flash": 256}[name]
    if device.type == "cpu" and name == "flash":
        return None
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0 or newer, and {torch.cuda.get_device_name(device)} is older"
    if name == "cudnn" and (torch.backends.cudnn.version() or 0) < 90000:
        return "needs PyTorch with cuDNN 9 or newer"
    if head_dim % 8 or head_dim > most:
        return f"takes a head_dim that is a multiple of 8 up to {most}, not {head_dim}"
    return half_precision_only(dtype)


def _alike(*tensors: Tensor) -> list[Tensor]:
    """In the accumulation dtype, every query head with keys of its own."""
    heads = tensors[0].shape[2]
    wide = [x.to(accumulation_dtype(x.dtype)) for x in tensors]
    return [x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2) for x in wide]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """(batch, rows, heads, head_dim), made contiguous -> a view (batch, heads, rows, head_dim)."""
    return [x.contiguous().transpose(1, 2) for x in tensors]


def _rows_first(grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


@cache
def flash4_interface() -> Any:
    """flash-attn-4's own interface. What it imports warns of its own dependencies, which is no caller's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from flash_attn.cute import interface

    return interface
