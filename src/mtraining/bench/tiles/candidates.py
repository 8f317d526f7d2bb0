"""The short list of tiles that `mtraining bench tiles` tries for a kernel: the table's first, then what GPUs from A100
to Blackwell may like better. Larger ones reuse more of what they fetch; smaller ones spill less and fit anywhere."""

from __future__ import annotations

import torch

from mtraining.kernel.measured_tiles import TileSizes, misfit
from mtraining.kernel.triton.tile_sizes import cut_tiles, default_tiles, padded

Shapes = tuple[tuple[int, int, int, int], ...]  # block_m, block_n, warps, stages

# By family of kernels and largest padded head_dim served, for 16-bit inputs.
_FORWARD: dict[int, Shapes] = {
    64: ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 4, 2), (128, 128, 8, 2)),
    128: (
        (64, 64, 4, 3),
        (64, 64, 4, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 32, 4, 3),
        (128, 128, 8, 2),
    ),
    256: ((64, 32, 4, 2), (64, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2)),
}
_DQ: dict[int, Shapes] = {
    64: ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 8, 2), (128, 32, 4, 3)),
    128: ((64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 2), (128, 32, 8, 2)),
    256: ((64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2), (32, 64, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
}
_DKDV: dict[int, Shapes] = {
    64: ((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (32, 64, 4, 3)),
    128: ((64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (32, 64, 4, 2), (32, 128, 8, 2)),
    256: ((32, 64, 8, 2), (64, 64, 8, 1), (32, 32, 4, 2), (32, 32, 8, 2), (64, 32, 8, 2), (16, 64, 8, 2)),
}
_FAMILIES = {"forward": _FORWARD, "dq": _DQ, "dkdv": _DKDV}
# For tiles_forward where there is a copy engine.
_TMA: dict[int, Shapes] = {
    64: ((64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3)),
    128: ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2)),
    256: ((64, 32, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2)),
}
# Exact products of fp32 have no tensor cores to feed, and take twice the room.
_FP32: Shapes = (
    (32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 4, 2), (64, 32, 4, 1), (32, 64, 4, 1), (64, 64, 8, 1),
)  # fmt: skip
_INTERPRETER: Shapes = ((16, 32, 4, 1),)


def candidates(
    kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int
) -> list[TileSizes]:
    """What to try for a kernel, cut to the block size, each once; the tables' entry is the first."""
    engine = False
    if device.type != "cuda":
        tried = [TileSizes(*shape) for shape in _INTERPRETER]
    elif dtype.itemsize == 4:
        tried = [TileSizes(*shape) for shape in _FP32]
    else:
        lanes = max(64, padded(head_dim))
        tried = [TileSizes(*shape) for shape in _FAMILIES[kernel.rpartition("_")[2]][lanes]]
        # The copy engine fetches whole lanes only.
        engine = torch.cuda.get_device_capability(device) >= (9, 0) and head_dim == padded(head_dim)
        if kernel == "tiles_forward" and engine:
            tried += [TileSizes(*shape, tma=True) for shape in _TMA[lanes]]
    first = default_tiles(kernel, device, dtype, head_dim)
    cut = [
        cut_tiles(kernel, tiles._replace(tma=tiles.tma and engine), block_size) for tiles in (first, *tried)
    ]
    return [tiles for tiles in dict.fromkeys(cut) if misfit(kernel, tiles, block_size) is None]
