"""The Triton backend: NVIDIA GPUs from sm_80 on, or the CPU through Triton's interpreter.

Nothing here waits for the device: grids follow from shapes, and lists and counts are built and read on the device.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mtraining.errors import UserError
from mtraining.kernel.backend import Columns, QueryGradient
from mtraining.kernel.index import SparseIndex
from mtraining.kernel.placement import Placement
from mtraining.kernel.triton import columns as column_kernels
from mtraining.kernel.triton import compact
from mtraining.kernel.triton import slashes as slash_kernels
from mtraining.kernel.triton.common import key_gradients, strided
from mtraining.kernel.triton.delta import row_delta_kernel
from mtraining.kernel.triton.estimate import TritonEstimation, unit_head_dim
from mtraining.kernel.triton.hidden import column_tables, tables_of_backward
from mtraining.kernel.triton.launch import launch
from mtraining.kernel.triton.lists import TileLists, lists_both_ways, tile_lists
from mtraining.kernel.triton.tile_sizes import check_block_size, choose_tiles, interpreted, padded

HEAD_DIMS = (64, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WAVES = 4  # programs wanted for each multiprocessor before work is split further


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot serve such tensors, as a clause after "kernel: 'triton'"; None where it can."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"needs compute capability 8.0 or newer, and {torch.cuda.get_device_name(device)} is older"
    elif not (device.type == "cpu" and interpreted()):
        return f"needs an NVIDIA GPU, not {device.type} (TRITON_INTERPRET=1 runs it on the CPU, slowly, for tests)"
    if dtype not in DTYPES:
        return f"takes bfloat16, float16 or float32, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS and not interpreted():
        return f"takes head_dim {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


def _fits_copy_engine(x: Tensor) -> bool:
    """Whether TMA can address ``x``: 16-byte aligned base and strides."""
    return x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in x.stride()[:3])


class TritonBackend(TritonEstimation):
    """Implements :class:`mtraining.kernel.backend.Backend`; results repeat bit for bit."""

    name = "triton"

    def row_delta(self, out: Tensor, dout: Tensor) -> Tensor:
        out, dout = unit_head_dim(out), unit_head_dim(dout)
        batch, rows, heads, dim = out.shape
        delta = torch.empty(batch, heads, rows, dtype=torch.float32, device=out.device)
        block_m = 32
        launch(row_delta_kernel, (triton.cdiv(rows, block_m) * batch * heads,))(
            strided(out, fixed_row=False), strided(dout, fixed_row=False), delta, rows, heads,
            HEAD_DIM=dim, BLOCK_D=padded(dim), BLOCK_M=block_m,
        )  # fmt: skip
        return delta

    def tiles_forward(
        self, q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, placement: Placement, scale: float,
        out: Tensor | None, lse: Tensor | None, *, columns: Columns | None = None, final: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, k, v = unit_head_dim(q), unit_head_dim(k), unit_head_dim(v)
        check_call(index, scale)
        if columns is not None:
            out, lse = self.columns_forward(q, *columns, index, placement.q_blocks, scale, out, lse)
        batch, _, heads, dim = q.shape
        kv_heads, group = k.shape[2], heads // k.shape[2]
        tiles = choose_tiles("tiles_forward", q, index.block_size)
        lists = tile_lists(index, placement, key_major=False)
        (new_out, merging), new_lse = partial(q, out), partial_lse(q, lse)
        rows, cols = lists.row_blocks.numel(), lists.col_blocks.numel()
        tma = tiles.tma and dim == padded(dim) and _fits_copy_engine(k) and _fits_copy_engine(v)
        block = [1, tiles.block_n, 1, dim]
        descriptors = [TensorDescriptor.from_tensor(x, block) for x in (k, v)] if tma else [k, v]
        launch(slash_kernels.forward_kernel, (batch * heads * rows * (index.block_size // tiles.block_m),))(
            strided(q), strided(k), strided(v), *descriptors, strided(new_out), new_lse, lists.for_queries(),
            scale, kv_heads, rows, cols, lists.diagonal,
            HAS_PREV=merging, TOEPLITZ=lists.toeplitz, GROUP=group, SIZE=index.block_size, HEAD_DIM=dim,
            BLOCK_D=padded(dim), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, PRECISION=_precision(q), TMA=tma,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return new_out.to(q.dtype) if final else new_out, new_lse

    def tiles_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        placement: Placement, scale: float,
    ) -> tuple[Tensor, QueryGradient]:  # fmt: skip
        dout, q, k, v = unit_head_dim(dout), unit_head_dim(q), unit_head_dim(k), unit_head_dim(v)
        lse, delta = lse.contiguous(), delta.contiguous()
        check_call(index, scale)
        dout = dout.to(q.dtype)
        by_query, by_key = lists_both_ways(index, placement)
        dkv = self.tiles_dkdv(dout, q, k, v, lse, delta, by_key, placement, index.block_size, scale)

        def query_gradient(
            dq: Tensor | None, *, columns: Columns | None = None, final: bool = False
        ) -> Tensor:
            total = self.tiles_dq(dout, q, k, v, lse, delta, by_query, index.block_size, scale, dq)
            if columns is not None:
                self.columns_dq(dout, q, *columns, lse, delta, index, placement.q_blocks, scale, total)
            return total.to(q.dtype) if final else total

        return dkv, query_gradient

    def tiles_dq(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, lists: TileLists, size: int,
        scale: float, dq: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The slash tiles' share of dq, added to ``dq`` if there is one; tensors as ``tiles_backward`` lines them up.

        Args:
            lists: by query blocks.
            size: of a block, in tokens.
        """
        batch, _, heads, dim = q.shape
        kv_heads, group = k.shape[2], heads // k.shape[2]
        tiles = choose_tiles("tiles_dq", q, size)
        rows, cols = lists.row_blocks.numel(), lists.col_blocks.numel()
        total, adding = partial(q, dq)
        launch(slash_kernels.query_gradient_kernel, (batch * heads * rows * (size // tiles.block_m),))(
            strided(dout), strided(q), strided(k), strided(v), lse, delta, strided(total), lists.for_queries(),
            scale, kv_heads, rows, cols, lists.diagonal,
            ADD=adding, TOEPLITZ=lists.toeplitz, GROUP=group, SIZE=size, HEAD_DIM=dim, BLOCK_D=padded(dim),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, PRECISION=_precision(q),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return total

    def tiles_dkdv(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, lists: TileLists,
        placement: Placement, size: int, scale: float,
    ) -> Tensor:  # fmt: skip
        """Gradients of k and v through slash tiles, (2, batch, keys, kv_heads, head_dim); otherwise as ``tiles_dq``.

        Args:
            lists: by key blocks, or Toeplitz, which serve both.
        """
        batch, _, heads, dim = q.shape
        kv_heads, group, cols = k.shape[2], heads // k.shape[2], placement.k_blocks.numel()
        tiles = choose_tiles("tiles_dkdv", q, size)
        programs = batch * kv_heads * cols * (size // tiles.block_n)
        splits = ways_to_split(programs, group, q.device)
        while group % splits:
            splits -= 1
        dkv = torch.empty(2, splits * batch, *k.shape[1:], dtype=torch.float32, device=k.device)
        launch(slash_kernels.key_gradient_kernel, (programs * splits,))(
            strided(dout), strided(q), strided(k), strided(v), lse, delta, key_gradients(dkv), lists.for_keys(),
            scale, batch, kv_heads, cols, placement.q_blocks.numel(), lists.diagonal,
            TOEPLITZ=lists.toeplitz, GROUP=group, SPLITS=splits, SIZE=size, HEAD_DIM=dim, BLOCK_D=padded(dim),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, PRECISION=_precision(q),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return summed(dkv, splits)

    def columns_forward(
        self, q: Tensor, ck: Tensor, cv: Tensor, index: SparseIndex, q_blocks: Tensor, scale: float,
        out: Tensor | None, lse: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(out, lse) of the columns alone, merged with what is there, if anything."""
        q, ck, cv = unit_head_dim(q), unit_head_dim(ck), unit_head_dim(cv)
        batch, _, heads, dim = q.shape
        rows, size, capacity = q_blocks.numel(), index.block_size, index.columns.shape[2]
        tiles = choose_tiles("columns_forward", q, size)
        (new_out, merging), new_lse = partial(q, out), partial_lse(q, lse)
        tables = column_tables(index, q_blocks)
        launch(column_kernels.forward_kernel, (batch * heads * rows * (size // tiles.block_m),))(
            strided(q), strided(ck), strided(cv), strided(new_out), new_lse, tables.for_queries(),
            scale, heads, rows, capacity, index.num_blocks, tables.words.shape[-1],
            HAS_PREV=merging, EVEN=capacity % tiles.block_n == 0, SIZE=size, HEAD_DIM=dim, BLOCK_D=padded(dim),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, PRECISION=_precision(q),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return new_out, new_lse

    def columns_dq(
        self, dout: Tensor, q: Tensor, ck: Tensor, cv: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        q_blocks: Tensor, scale: float, dq: Tensor,
    ) -> None:  # fmt: skip
        """Add the columns' share to ``dq`` (fp32), in place."""
        tables = tables_of_backward(index, q_blocks, ck)
        dout, q, ck, cv = unit_head_dim(dout), unit_head_dim(q), unit_head_dim(ck), unit_head_dim(cv)
        lse, delta = lse.contiguous(), delta.contiguous()
        batch, _, heads, dim = q.shape
        rows, size, capacity = q_blocks.numel(), index.block_size, index.columns.shape[2]
        tiles = choose_tiles("columns_dq", q, size)
        launch(column_kernels.query_gradient_kernel, (batch * heads * rows * (size // tiles.block_m),))(
            strided(dout), strided(q), strided(ck), strided(cv), lse, delta, strided(dq), tables.for_queries(),
            scale, heads, rows, capacity, index.num_blocks, tables.words.shape[-1],
            ADD=True, EVEN=capacity % tiles.block_n == 0, SIZE=size, HEAD_DIM=dim, BLOCK_D=padded(dim),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, PRECISION=_precision(q),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def columns_backward(
        self, dout: Tensor, q: Tensor, ck: Tensor, cv: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        q_blocks: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        check_call(index, scale)
        tables = tables_of_backward(index, q_blocks, ck)
        dout, q, ck, cv = unit_head_dim(dout), unit_head_dim(q), unit_head_dim(ck), unit_head_dim(cv)
        lse, delta = lse.contiguous(), delta.contiguous()
        dout = dout.to(q.dtype)
        batch, _, heads, dim = q.shape
        rows, size, capacity = q_blocks.numel(), index.block_size, index.columns.shape[2]
        tiles = choose_tiles("columns_dkdv", q, size)
        programs = batch * heads * triton.cdiv(capacity, tiles.block_n)
        splits = ways_to_split(programs, rows, q.device)
        grads = torch.empty(2, splits * batch, *ck.shape[1:], dtype=torch.float32, device=ck.device)
        launch(column_kernels.key_gradient_kernel, (programs * splits,))(
            strided(dout), strided(q), strided(ck), strided(cv), lse, delta, key_gradients(grads), tables.for_keys(),
            scale, batch, heads, rows, capacity, index.num_blocks, tables.words.shape[-1], splits,
            EVEN=capacity % tiles.block_n == 0, SIZE=size, HEAD_DIM=dim, BLOCK_D=padded(dim),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, PRECISION=_precision(q),
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return summed(grads, splits)

    def gather_columns(self, k: Tensor, v: Tensor, columns: Tensor, slots: Tensor) -> Tensor:
        return compact.gather_columns(
            unit_head_dim(k), unit_head_dim(v), columns.contiguous(), slots.contiguous()
        )

    def scatter_columns(self, grads: Tensor, columns: Tensor, slots: Tensor, dkv: Tensor) -> None:
        compact.scatter_columns(unit_head_dim(grads), columns.contiguous(), slots.contiguous(), dkv)


def check_call(index: SparseIndex, scale: float) -> None:
    check_block_size(index.block_size)
    if scale <= 0:
        raise UserError(f"scale: kernel=triton needs a positive factor, not {scale}; use 1 / sqrt(head_dim).")


def _precision(q: Tensor) -> str:
    """fp32 inputs are multiplied exactly, never rounded to tf32."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def partial(q: Tensor, previous: Tensor | None) -> tuple[Tensor, bool]:
    """Where a kernel writes out or dq, fp32 with unit stride along head_dim, and whether a result stands there to go on
    from."""
    if previous is None:
        return torch.empty(q.shape, dtype=torch.float32, device=q.device), False
    return unit_head_dim(previous), True


def partial_lse(q: Tensor, lse: Tensor | None) -> Tensor:
    """Where a forward kernel writes lse: the previous one, or room for the first."""
    batch, rows, heads, _ = q.shape
    new = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device) if lse is None else lse
    return new.contiguous()


def ways_to_split(programs: int, most: int, device: torch.device) -> int:
    """How many ways to split each program's work so that the GPU is full; at most ``most``, and at most 16."""
    if device.type != "cuda":
        return min(2, most)  # the interpreter tests take the split path too
    wanted = _WAVES * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(most, 16, triton.cdiv(wanted, programs)))


def summed(grads: Tensor, splits: int) -> Tensor:
    """(2, splits * batch, ...) -> (2, batch, ...): the parts of a split gradient, added up in their order."""
    return grads if splits == 1 else grads.unflatten(1, (splits, -1)).sum(1)
