"""The Triton backend on Hopper: its kernels there are written in Gluon, Triton's lower level (hopper/common.py).

Serves 16-bit inputs, head_dim 64 and 128, blocks of 128; whatever else comes goes to the portable kernels, which give
the same results more slowly.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mtraining.kernel.backend import Columns, QueryGradient
from mtraining.kernel.hopper import forward as hopper_forward
from mtraining.kernel.hopper import keys as hopper_keys
from mtraining.kernel.hopper import queries as hopper_queries
from mtraining.kernel.hopper.items import ColumnLists, Constants, Target
from mtraining.kernel.hopper.keys import KeyConstants
from mtraining.kernel.index import SparseIndex
from mtraining.kernel.placement import Placement
from mtraining.kernel.triton.backend import (
    TritonBackend,
    check_call,
    partial,
    partial_lse,
    summed,
    ways_to_split,
)
from mtraining.kernel.triton.common import key_gradients
from mtraining.kernel.triton.hidden import ColumnTables, column_tables, tables_of_backward
from mtraining.kernel.triton.launch import launch
from mtraining.kernel.triton.lists import TileLists, lists_both_ways, tile_lists

BLOCK = 128
HEAD_DIMS = (64, 128)
_HALF = BLOCK // 2  # rows of one warp group
_QUERIES = 64  # that the key-major kernels visit at a time
# Tiles in shared memory, being fetched or in use: as many as fit beside what stays.
_STAGES, _KEY_STAGES = 2, 3
_WARPS = 4  # of the first warp group; the kernels add the others
_COPY_BYTES = 16  # the copy engine wants addresses and strides to be multiples of


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why these kernels cannot serve such tensors; None where they can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "needs a Hopper GPU"
    if not triton.__version__.startswith("3.6."):
        return f"is written for Triton 3.6, and {triton.__version__} is installed"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"takes head_dim {' or '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


class HopperBackend(TritonBackend):
    """Implements :class:`mtraining.kernel.backend.Backend`; results repeat bit for bit."""

    name = "triton"

    def tiles_forward(
        self, q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, placement: Placement, scale: float,
        out: Tensor | None, lse: Tensor | None, *, columns: Columns | None = None, final: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if index.block_size != BLOCK:
            return super().tiles_forward(
                q, k, v, index, placement, scale, out, lse, columns=columns, final=final
            )
        check_call(index, scale)
        tables = None if columns is None else column_tables(index, placement.q_blocks)
        lists = tile_lists(index, placement, key_major=False)
        work = _QueryWork(q, k, v, lists, index, columns, tables)
        target = _Target(q, out, final)
        lse = partial_lse(q, lse)
        launch(hopper_forward.forward_kernel, work.grid)(
            _boxes(q, _HALF), *work.keys, target.boxes, target.for_kernel(), lse, work.counter, *work.lists, scale,
            *work.counts, work.constants(target.merging, final), num_warps=_WARPS,
        )  # fmt: skip
        return target.result, lse

    def tiles_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        placement: Placement, scale: float,
    ) -> tuple[Tensor, QueryGradient]:  # fmt: skip
        if index.block_size != BLOCK:
            return super().tiles_backward(dout, q, k, v, lse, delta, index, placement, scale)
        check_call(index, scale)
        dout, lse2, delta = dout.to(q.dtype), _log2(lse), delta.contiguous()
        batch, _, heads, dim = q.shape
        kv_heads, group = k.shape[2], heads // k.shape[2]
        by_query, lists = lists_both_ways(index, placement)
        rows, cols = placement.q_blocks.numel(), placement.k_blocks.numel()
        splits = ways_to_split(batch * kv_heads * cols, group, q.device)
        while group % splits:
            splits -= 1
        dkv = torch.empty(2, splits * batch, *k.shape[1:], dtype=torch.float32, device=k.device)
        launch(hopper_keys.key_tiles_kernel, (batch * kv_heads * cols * splits,))(
            _boxes(q, _QUERIES), _boxes(dout, _QUERIES), _boxes(k, _HALF), _boxes(v, _HALF), _rows(lse2), _rows(delta),
            key_gradients(dkv), lists.for_keys(), scale, batch, kv_heads, cols, rows, lists.diagonal,
            KeyConstants(
                lists.toeplitz, False, index.starts is not None, group, splits, BLOCK, dim, _QUERIES, _KEY_STAGES
            ),
            num_warps=_WARPS,
        )  # fmt: skip

        def query_gradient(
            dq: Tensor | None, *, columns: Columns | None = None, final: bool = False
        ) -> Tensor:
            tables = None if columns is None else tables_of_backward(index, placement.q_blocks, columns[0])
            work = _QueryWork(q, k, v, by_query, index, columns, tables)
            target = _Target(q, dq, final)
            launch(hopper_queries.query_gradient_kernel, work.grid)(
                _boxes(q, _HALF), _boxes(dout, _HALF), *work.keys, target.boxes, target.for_kernel(), lse2, delta,
                work.counter, *work.lists, scale, *work.counts, work.constants(target.merging, final),
                num_warps=_WARPS,
            )  # fmt: skip
            return target.result

        return summed(dkv, splits), query_gradient

    def columns_backward(
        self, dout: Tensor, q: Tensor, ck: Tensor, cv: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        q_blocks: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        if index.block_size != BLOCK:
            return super().columns_backward(dout, q, ck, cv, lse, delta, index, q_blocks, scale)
        check_call(index, scale)
        dout, lse2, delta = dout.to(q.dtype), _log2(lse), delta.contiguous()
        batch, _, heads, dim = q.shape
        rows, capacity = q_blocks.numel(), index.columns.shape[2]
        tables = tables_of_backward(index, q_blocks, ck)
        tiles = triton.cdiv(capacity, BLOCK)
        splits = ways_to_split(batch * heads * tiles, rows, q.device)
        grads = torch.empty(2, splits * batch, *ck.shape[1:], dtype=torch.float32, device=ck.device)
        launch(hopper_keys.key_columns_kernel, (batch * heads * tiles * splits,))(
            _boxes(q, _QUERIES), _boxes(dout, _QUERIES), _boxes(ck, _HALF), _boxes(cv, _HALF), _rows(lse2),
            _rows(delta), key_gradients(grads), tables.for_keys(), scale, batch, heads, rows, capacity,
            index.num_blocks, tables.words.shape[-1], splits,
            KeyConstants(False, True, index.starts is not None, 1, 1, BLOCK, dim, _QUERIES, _KEY_STAGES),
            num_warps=_WARPS,
        )  # fmt: skip
        return summed(grads, splits)


class _QueryWork:
    """What both query-major kernels are given, in their order: descriptors of keys, lists, counts and constants."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, lists: TileLists, index: SparseIndex, columns: Columns | None,
        tables: ColumnTables | None,
    ) -> None:  # fmt: skip
        batch, _, heads, dim = q.shape
        rows, cols = lists.row_blocks.numel(), lists.col_blocks.numel()
        items = batch * heads * rows
        self.grid = (_programs(items, q.device),)
        self.counter = torch.zeros(1, dtype=torch.int32, device=q.device)
        if columns is None or tables is None:
            # Without columns nothing of theirs is read; any table of int32 will do.
            self.keys = (_boxes(k, BLOCK), _boxes(v, BLOCK)) * 2
            of_columns, sizes = ColumnLists(*(lists.bounds,) * 4, *(None,) * 3), (0, 0)
        else:
            self.keys = tuple(_boxes(x, BLOCK) for x in (k, v, *columns))
            of_columns = ColumnLists(
                tables.columns,
                tables.words,
                tables.before,
                tables.upto,
                tables.starts,
                tables.begin,
                tables.masked,
            )
            sizes = (index.columns.shape[2], tables.words.shape[-1])
        self.lists = (lists.for_queries(), of_columns)
        self.counts = (items, rows, heads, cols, lists.diagonal, *sizes)
        starts, group = index.starts is not None, heads // k.shape[2]
        self._fixed = (lists.toeplitz, columns is not None, starts, group, BLOCK, dim, _STAGES)

    def constants(self, merging: bool, final: bool) -> Constants:
        return Constants(merging, final, *self._fixed)


class _Target:
    """Where a query-major kernel writes: fp32 in the memory of what it adds to or merges with, or final in q's dtype.

    ``previous`` is fp32 with unit stride along head_dim; where there is none, only its strides count.
    ``boxes`` addresses ``result`` for the copy engine where that is final, else any tensor.
    """

    def __init__(self, q: Tensor, previous: Tensor | None, final: bool) -> None:
        if final:
            self.result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            self.previous, self.merging = (self.result, False) if previous is None else partial(q, previous)
        else:
            self.previous, self.merging = partial(q, previous)
            self.result = self.previous
        self.boxes = _boxes(self.result if final else q, _HALF)

    def for_kernel(self) -> Target:
        batch, row, head, _ = self.previous.stride()
        return Target(self.previous, self.result, batch, gl.constexpr(row), head)


def _programs(items: int, device: torch.device) -> int:
    """One a multiprocessor, whose shared memory it fills; each takes block of queries after block of queries."""
    return min(items, torch.cuda.get_device_properties(device).multi_processor_count)


def _boxes(x: Tensor, rows: int) -> TensorDescriptor:
    """Boxes of ``rows`` tokens of one head of ``x`` (batch, tokens, heads, head_dim), for the copy engine."""
    step = _COPY_BYTES // x.element_size()
    strides = [s if n > 1 else step for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    if x.stride(-1) != 1 or x.data_ptr() % _COPY_BYTES or any(s % step or s == 0 for s in strides):
        x = x.clone(memory_format=torch.contiguous_format)
        strides = [s if n > 1 else step for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, 1, x.shape[-1]], layout)


def _log2(lse: Tensor) -> Tensor:
    """``lse`` in units of log2, contiguous; rows that see nothing get 0, so that no difference becomes NaN."""
    return (lse * math.log2(math.e)).masked_fill_(lse.isneginf(), 0.0).contiguous()


def _rows(statistic: Tensor) -> TensorDescriptor:
    """Values of the queries that the key-major kernels visit at a time, of a contiguous (batch, heads, rows) tensor."""
    flat = statistic.flatten(0, 1)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(flat, list(flat.shape), [flat.shape[1], 1], [1, _QUERIES], layout)
