"""Tile sizes of the attention kernels.

A *tile* is a block of queries by a block of keys that the index selects. A kernel works on it in pieces, and the shape
of a piece, with the warps and pipeline stages for it, is the kernel's tile sizes. (What the copy engine moves at a time
is a *box*.)

Measured sizes come first: `mtraining bench tiles` keeps what it measured on this very GPU in a file
(measured_tiles.py). Then come the fixed tables here. Nothing is searched at run time: a search may choose differently
on the next run. Then neither two ranks nor a resumed run would repeat the same sums. The tables were
chosen by measurement on Hopper. For other GPUs they were chosen so that nothing spills and shared memory suffices
(``docs/experiments/kernels.md``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import triton

from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import KernelCase, TileSizes, measured_tiles

# kernel -> largest padded head_dim served -> tile sizes, for 2-byte inputs
Table = dict[str, dict[int, TileSizes]]

# Data-centre Hopper and Blackwell: 227 KiB of shared memory, accumulators of a whole warp group.
LARGE: Table = {
    "tiles_forward": {
        64: TileSizes(64, 64, 4, 3),
        128: TileSizes(64, 64, 4, 3, tma=True),
        256: TileSizes(128, 64, 8, 2),
    },
    "tiles_dq": {64: TileSizes(64, 64, 4, 2), 128: TileSizes(128, 64, 8, 3), 256: TileSizes(64, 64, 8, 2)},
    "tiles_dkdv": {64: TileSizes(64, 64, 4, 3), 128: TileSizes(64, 64, 4, 2), 256: TileSizes(32, 64, 8, 2)},
    "columns_forward": {
        64: TileSizes(64, 128, 4, 2),
        128: TileSizes(64, 64, 4, 3),
        256: TileSizes(128, 64, 8, 2),
    },
    "columns_dq": {64: TileSizes(64, 64, 4, 3), 128: TileSizes(128, 64, 8, 3), 256: TileSizes(64, 64, 8, 2)},
    "columns_dkdv": {
        64: TileSizes(64, 64, 4, 3),
        128: TileSizes(64, 128, 8, 3),
        256: TileSizes(32, 64, 8, 2),
    },
}
# Ampere, Ada and small Blackwell: from 99 KiB of shared memory, accumulators of a warp.
_SMALL_FORWARD = {64: TileSizes(128, 64, 4, 3), 128: TileSizes(128, 64, 8, 2), 256: TileSizes(64, 32, 8, 2)}
_SMALL_DQ = {64: TileSizes(64, 64, 4, 3), 128: TileSizes(64, 64, 8, 2), 256: TileSizes(32, 32, 8, 2)}
_SMALL_DKDV = {64: TileSizes(64, 64, 8, 2), 128: TileSizes(64, 64, 8, 2), 256: TileSizes(32, 32, 8, 2)}
SMALL: Table = {
    "tiles_forward": _SMALL_FORWARD,
    "tiles_dq": _SMALL_DQ,
    "tiles_dkdv": _SMALL_DKDV,
    "columns_forward": _SMALL_FORWARD,
    "columns_dq": _SMALL_DQ,
    "columns_dkdv": _SMALL_DKDV,
}
_FP32 = TileSizes(32, 32, 4, 1)  # exact products of fp32 inputs: no tensor cores, so small tiles
_INTERPRETER = TileSizes(64, 64, 4, 1)

_forced: dict[str, TileSizes] = {}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def choose_tiles(kernel: str, q: torch.Tensor, block_size: int) -> TileSizes:
    """What a kernel takes: measured tile sizes, else those of the tables.

    Args:
        kernel: a key of the tables.
        q: the queries, for head_dim, dtype and device.
        block_size: of the index, a multiple of 16.

    Raises:
        UserError: the file of measured tiles is damaged.
    """
    tiles = _forced.get(kernel)
    if tiles is None:
        tiles = measured_tiles(q.device).get(KernelCase(kernel, q.dtype, q.shape[-1], block_size))
    if tiles is None:
        tiles = default_tiles(kernel, q.device, q.dtype, q.shape[-1])
    return cut_tiles(kernel, tiles, block_size)


@contextmanager
def forced_tiles(tiles: Mapping[str, TileSizes]) -> Iterator[None]:
    """While active these kernels take these tiles, for a measurement; not from several threads at once."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def default_tiles(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> TileSizes:
    """What a kernel takes where nothing was measured, before it is cut to the block size."""
    if device.type != "cuda":
        return _INTERPRETER
    if dtype.itemsize == 4:
        return _FP32
    return table_tiles(kernel, head_dim, torch.cuda.get_device_capability(device))


def cut_tiles(kernel: str, tiles: TileSizes, block_size: int) -> TileSizes:
    """Tile sizes that divide ``block_size``: the queries always, the keys in kernels of slash tiles."""
    block_m = _divisor(tiles.block_m, block_size)
    block_n = tiles.block_n if kernel.startswith("columns") else _divisor(tiles.block_n, block_size)
    return tiles._replace(block_m=block_m, block_n=block_n)


def table_tiles(kernel: str, head_dim: int, capability: tuple[int, int]) -> TileSizes:
    """The table's entry for a head_dim (unpadded) on a GPU of this compute capability."""
    rows = (LARGE if capability[0] in (9, 10) else SMALL)[kernel]
    return rows[min(limit for limit in rows if limit >= head_dim)]


def check_block_size(block_size: int) -> None:
    """Refuse blocks that are not made of whole tiles.

    Raises:
        UserError: with the nearest size that works.
    """
    if block_size % 16:
        raise UserError(
            f"block_size: kernel=triton needs a multiple of 16 tokens, not {block_size}; "
            f"use {max(16, round(block_size / 16) * 16)}, or kernel=reference (slow)."
        )


def padded(head_dim: int) -> int:
    """Lanes a tile of this head_dim takes."""
    return max(16, triton.next_power_of_2(head_dim))


def _divisor(block: int, block_size: int) -> int:
    while block_size % block:
        block //= 2
    return block
