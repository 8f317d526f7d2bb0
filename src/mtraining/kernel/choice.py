"""Which backend serves a call."""

from __future__ import annotations

import logging
from functools import cache

import torch

from mtraining.errors import UserError
from mtraining.kernel.backend import KERNELS, Backend, Decode
from mtraining.kernel.external.dense import WithDense
from mtraining.kernel.external.dense_kernels import CudnnDense, DenseKernel, Flash4Dense, FlashDense
from mtraining.kernel.external.dense_kernels import unsupported as dense_unsupported
from mtraining.kernel.reference.attention import ReferenceBackend
from mtraining.kernel.reference.decode import decode_attention as reference_decode

logger = logging.getLogger(__name__)

# The fastest first: 670 / 610, 671 / 537 and 347 / 317 TFLOP/s forward / backward on an H200.
_DENSE: dict[str, type[DenseKernel]] = {"flash4": Flash4Dense, "cudnn": CudnnDense, "flash": FlashDense}


def select_backend(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend for ``kernel``.

    * ``auto``: the fastest for sparse indices, with the fastest dense kernel for dense ones in layouts of runs, which
      repeats bit for bit where PyTorch is asked for deterministic algorithms; the log says which they are, and why.
    * ``reference`` and ``triton``: everything by that backend, dense attention as tiles too.
    * ``flash4``: flash-attn-4 for tiles and for dense attention, Triton for the rest.
    * ``cudnn`` and ``flash``: dense attention only.

    Raises:
        UserError: unknown name, or a backend that cannot serve this device, dtype or head_dim.
    """
    return _chosen(kernel, device, dtype, head_dim, torch.are_deterministic_algorithms_enabled())


def select_decode(kernel: str, device: torch.device, dtype: torch.dtype) -> Decode:
    """The kernel that decodes, one new token a row over a cache.

    Triton's on NVIDIA GPUs, in bf16, fp16 and fp32, whatever ``kernel`` serves longer queries; ``reference`` elsewhere
    and where it is asked for.

    Raises:
        UserError: unknown name, or Triton is missing on a GPU.
    """
    if kernel not in KERNELS:
        raise UserError(f"kernel: {kernel!r} is not known; choose one of {', '.join(KERNELS)}.")
    if kernel == "reference" or device.type != "cuda" or dtype == torch.float64:
        return reference_decode
    try:
        from mtraining.kernel.triton.decode import decode_attention
    except ImportError as missing:
        raise UserError(
            f"kernel: decoding on a GPU needs the triton package ({missing}); kernel=reference does without, slowly."
        ) from missing
    return decode_attention


@cache
def _chosen(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> Backend:
    if kernel not in KERNELS:
        raise UserError(f"kernel: {kernel!r} is not known; choose one of {', '.join(KERNELS)}.")
    if kernel == "reference":
        return ReferenceBackend()
    if kernel == "triton":
        return _triton(device, dtype, head_dim)
    if kernel == "flash4":
        return WithDense(kernel, _flash4(device, dtype, head_dim), Flash4Dense())
    if kernel in _DENSE:
        reason = dense_unsupported(kernel, device, dtype, head_dim)
        if reason is not None:
            raise UserError(f"kernel: {kernel!r} {reason}; use kernel=auto.")
        return WithDense(kernel, _sparse(device, dtype, head_dim)[0], _DENSE[kernel](), only=True)
    sparse, why = _sparse(device, dtype, head_dim)
    dense, why_dense = _fastest_dense(device, dtype, head_dim, deterministic)
    logger.info(
        "kernel: auto chose %r for %s, %s, head_dim %d: %s; and for dense attention %r: %s",
        sparse.name, device.type, dtype, head_dim, why, dense.name if dense else sparse.name, why_dense,
    )  # fmt: skip
    return WithDense(f"{sparse.name}, dense {dense.name}", sparse, dense) if dense else sparse


def _sparse(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Backend, str]:
    if device.type == "cuda":
        backend = _triton(device, dtype, head_dim)
        return backend, f"the sparse kernels for NVIDIA GPUs, {_hopper_told(device, dtype, head_dim)}"
    return ReferenceBackend(), f"the only backend on {device.type}"


def _fastest_dense(
    device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> tuple[DenseKernel | None, str]:
    """The first that can serve, and what the faster ones lack."""
    reasons: list[str] = []
    for name, kernel in _DENSE.items():
        if name == "flash4":
            reason = _flash4_unsupported(device, dtype, head_dim)
        elif name == "cudnn" and deterministic:
            reason = "is not deterministic"
        else:
            reason = dense_unsupported(name, device, dtype, head_dim)
        if reason is None:
            return kernel(), "; ".join(["the fastest there is", *reasons])
        reasons.append(f"{name!r} {reason}")
    return None, "; ".join(reasons)


def _triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    remedy = "kernel=reference takes anything, slowly"
    try:
        from mtraining.kernel.triton.backend import TritonBackend, unsupported
    except ImportError as missing:
        raise UserError(f"kernel: 'triton' needs the triton package ({missing}); {remedy}.") from missing
    reason = unsupported(device, dtype, head_dim)
    if reason is not None:
        raise UserError(f"kernel: 'triton' {reason}; {remedy}.")
    if _hopper_unsupported(device, dtype, head_dim) is not None:
        return TritonBackend()
    from mtraining.kernel.hopper.backend import HopperBackend

    return HopperBackend()


def _hopper_told(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    reason = _hopper_unsupported(device, dtype, head_dim)
    return "in their form for Hopper" if reason is None else f"portable, for their form for Hopper {reason}"


def _hopper_unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    try:
        from mtraining.kernel.hopper.backend import unsupported
    except ImportError as missing:  # Gluon is young, and other releases of Triton may lack parts of it
        return f"needs Triton 3.6 ({missing})"
    return unsupported(device, dtype, head_dim)


def _flash4(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    reason = _flash4_unsupported(device, dtype, head_dim)
    if reason is not None:
        raise UserError(f"kernel: 'flash4' {reason}; use kernel=auto.")
    from mtraining.kernel.external.flash4 import Flash4Backend

    return Flash4Backend()


def _flash4_unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    try:
        from mtraining.kernel.external.flash4 import unsupported
    except ImportError as missing:
        return f"needs the triton package ({missing})"
    return unsupported(device, dtype, head_dim)
