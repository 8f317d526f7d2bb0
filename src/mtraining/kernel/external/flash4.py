"""Slash tiles through flash-attn-4's block-sparse kernels (Hopper); columns and estimation stay with Triton.

The block-sparse entry points are private, so one version is asked for by name. Facts about it that shape this
file:

* lists name full tiles, multiplied without a mask, and partial ones, where a ``mask_mod`` decides: here the tiles
  on the causal diagonal and, with starts, those that hold a key before a query's start. Then it reads the bounds of
  each query from two tables. With a ``mask_mod`` the flag ``causal`` is ignored;
* out, dq, dk and dv come back in the inputs' dtype: each partial result is rounded once (2^-9 relative in bf16)
  before it is merged or added in fp32, where the Triton kernels keep fp32 throughout;
* its backward takes ``out`` and an optional gradient of lse, and forms delta = rowsum(dout * out) - dlse: a zero
  ``out`` (one row, expanded) with dlse = -delta hands it the global delta that a ring needs;
* its backward adds dq (and, for grouped heads, dk and dv) with atomics: not bitwise repeatable;
* on Blackwell it wants query blocks of 256, which the index does not have.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel.backend import Columns, QueryGradient
from mtraining.kernel.external.dense_kernels import flash4_interface
from mtraining.kernel.external.partial import BlockLists, block_lists, merge_partial
from mtraining.kernel.index import SparseIndex
from mtraining.kernel.placement import Placement
from mtraining.kernel.starts import first_local_keys, last_local_keys
from mtraining.kernel.triton.backend import TritonBackend

VERSION = "4.0.0b36"
BLOCK = 128
HEAD_DIMS = (64, 96, 128)  # those that tests/gpu/test_flash4.py found right, forward and backward
DTYPES = (torch.bfloat16, torch.float16)


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot serve such tensors, as a clause after "kernel: 'flash4'"; None where it can."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, not {device.type}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"needs a Hopper GPU, and {torch.cuda.get_device_name(device)} is not one"
    return _unsupported_version() or _unsupported_tensors(dtype, head_dim)


def _unsupported_version() -> str | None:
    install = f"pip install flash-attn-4=={VERSION}"
    try:
        found = metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        return f"needs the package flash-attn-4 ({install})"
    if found != VERSION:
        return f"calls private functions of flash-attn-4 {VERSION}, and {found} is installed ({install})"
    return None


def _unsupported_tensors(dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in DTYPES:
        return f"takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"takes head_dim {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


class Flash4Backend(TritonBackend):
    """Implements :class:`mtraining.kernel.backend.Backend`; gradients of slash tiles do not repeat bit for bit."""

    name = "flash4"

    def tiles_forward(
        self, q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, placement: Placement, scale: float,
        out: Tensor | None, lse: Tensor | None, *, columns: Columns | None = None, final: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        check_call(index, deterministic=torch.are_deterministic_algorithms_enabled())
        if columns is not None:
            out, lse = self.columns_forward(q, *columns, index, placement.q_blocks, scale, out, lse)
        lists = block_lists(index, placement, key_major=False)
        part, part_lse, *_ = flash4_interface()._flash_attn_fwd(
            q, k, v, softmax_scale=scale, block_sparse_tensors=_as_blocks(lists), return_lse=True, pack_gqa=False,
            **_mask(index, placement),
        )  # fmt: skip
        return merge_partial(part, part_lse, out, lse, final=final)

    def tiles_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        placement: Placement, scale: float,
    ) -> tuple[Tensor, QueryGradient]:  # fmt: skip
        check_call(index, deterministic=torch.are_deterministic_algorithms_enabled())
        dout, lse = dout.to(q.dtype), lse.contiguous()
        lists = block_lists(index, placement, key_major=True)
        zero = torch.zeros(q.shape[-1], dtype=q.dtype, device=q.device).expand(q.shape)
        dkv = torch.empty(2, *k.shape, dtype=k.dtype, device=k.device)
        share, *_ = flash4_interface()._flash_attn_bwd(
            q, k, v, zero, dout, lse, softmax_scale=scale, block_sparse_tensors=_as_blocks(lists), dlse=-delta,
            dk=dkv[0], dv=dkv[1], **_mask(index, placement),
        )  # fmt: skip

        def query_gradient(
            dq: Tensor | None, *, columns: Columns | None = None, final: bool = False
        ) -> Tensor:
            if final and dq is None and columns is None:
                return share
            dq = share.float() if dq is None else dq.add_(share)
            if columns is not None:
                self.columns_dq(dout, q, *columns, lse, delta, index, placement.q_blocks, scale, dq)
            return dq.to(q.dtype) if final else dq

        return dkv, query_gradient


def check_call(index: SparseIndex, deterministic: bool) -> None:
    """Refuse what these kernels would do wrong, whatever the tensors.

    Raises:
        UserError: another block size than 128, or a run that wants repeatable gradients.
    """
    if index.block_size != BLOCK:
        raise UserError(
            f"pattern.block_size: kernel=flash4 computes blocks of {BLOCK} tokens, not {index.block_size}; "
            f"use pattern.block_size={BLOCK}, or kernel=triton."
        )
    if deterministic:
        raise UserError(
            "kernel: 'flash4' adds gradients in no fixed order, and deterministic algorithms were asked for; "
            "use kernel=triton, which repeats bit for bit."
        )


def _mask(index: SparseIndex, placement: Placement) -> dict[str, Any]:
    """The mask of partial tiles, and the tables that it reads."""
    if index.starts is None:
        return {"mask_mod": _diagonal_tile()}
    bounds = [
        first_local_keys(index.starts, placement, BLOCK),
        last_local_keys(index.starts, placement, BLOCK),
    ]
    return {"mask_mod": _between_bounds(), "aux_tensors": bounds}


def _as_blocks(lists: BlockLists) -> Any:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    return BlockSparseTensorsTorch(
        mask_block_cnt=lists.masked_counts,
        mask_block_idx=lists.masked,
        full_block_cnt=lists.full_counts,
        full_block_idx=lists.full,
        block_size=(BLOCK, BLOCK),
    )


@cache
def _diagonal_tile() -> Any:
    """Causality inside a tile whose query block is its key block, wherever the two stand locally."""
    import cutlass.cute as cute

    @cute.jit
    def diagonal_tile(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        return q_idx % BLOCK >= kv_idx % BLOCK

    return diagonal_tile


@cache
def _between_bounds() -> Any:
    """The keys from a query's first to its last, by tables of local positions (batch, queries) and (queries,)."""
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    @cute.jit
    def between_bounds(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def]
        first = utils.scalar_to_ssa(aux_tensors[0][batch[0], q_idx[0]], cutlass.Int32)
        last = utils.scalar_to_ssa(aux_tensors[1][q_idx[0]], cutlass.Int32)
        return (kv_idx >= first) & (kv_idx <= last)

    return between_bounds
