"""Tile sizes of the attention kernels.

Fixed tables, not a search at run time: a search may choose differently on the next run, and then neither two ranks
nor a resumed run would repeat the same sums. The entries were chosen by measurement (``docs/log.md``).
"""

from __future__ import annotations

import os
from typing import NamedTuple

import triton


class Tiles(NamedTuple):
    """Tile of queries x tile of keys, and how many warps and pipeline stages work on it."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


# kernel -> largest padded head_dim served -> tiles, for 2-byte inputs
_TABLE: dict[str, dict[int, Tiles]] = {
    "tiles_forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 4, 3), 256: Tiles(128, 64, 8, 2)},
    "tiles_dq": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
    "tiles_dkdv": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(32, 64, 8, 2)},
    "columns_forward": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 4, 3), 256: Tiles(128, 64, 8, 2)},
    "columns_dq": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(64, 32, 4, 2)},
    "columns_dkdv": {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 4, 2), 256: Tiles(32, 64, 8, 2)},
}
_FP32 = Tiles(32, 32, 4, 1)  # exact products of fp32 inputs: no tensor cores, so small tiles
_INTERPRETER = Tiles(64, 64, 4, 1)


def choose_tiles(kernel: str, head_dim: int, itemsize: int, block_size: int) -> Tiles:
    """Tiles for a kernel; those of slash tiles (and of queries) are cut to divide ``block_size``.

    Args:
        kernel: a key of the table.
        head_dim: unpadded.
        itemsize: bytes an input element takes.
        block_size: of the index, a multiple of 16.
    """
    if interpreted():
        tiles = _INTERPRETER
    elif itemsize == 4:
        tiles = _FP32
    else:
        rows = _TABLE[kernel]
        tiles = rows[min(limit for limit in rows if limit >= head_dim)]
    block_m = _divisor(tiles.block_m, block_size)
    block_n = tiles.block_n if kernel.startswith("columns") else _divisor(tiles.block_n, block_size)
    return tiles._replace(block_m=block_m, block_n=block_n)


def padded(head_dim: int) -> int:
    """Lanes a tile of this head_dim takes."""
    return max(16, triton.next_power_of_2(head_dim))


def _divisor(block: int, block_size: int) -> int:
    while block_size % block:
        block //= 2
    return block
