"""What columns cost beside tiles on this machine: the price that `mtraining calibrate` searches with."""

from __future__ import annotations

from torch import Tensor

from mtraining.bench.cases import Case
from mtraining.bench.problem import Layer, build
from mtraining.bench.timing import measure
from mtraining.evaluate.calibrate import densities
from mtraining.kernel import select_backend


def column_price(shape: tuple[int, int, int], tokens: int, block_size: int, like: Tensor) -> float:
    """What an entry of a column costs on this machine's kernel, forward and backward, beside an entry of a tile.

    Measured on random tensors under a random index of some tiles and some columns; areas are counted as
    :meth:`SparseIndex.computed_area` counts them.

    Args:
        shape: q_heads, kv_heads, head_dim.
        like: a tensor of the device and dtype that attention will have.
    """
    some = max(block_size, min(2048, tokens // 8))
    blocks = max(2.0, min(26.0, tokens / block_size / 8))
    case = Case(tokens, *shape, blocks, some, block_size=block_size, dtype=like.dtype)
    backend = select_backend("auto", like.device, like.dtype, shape[2])
    layer = Layer(backend, build(case, like.device, seed=0))
    runs = layer.phases()
    tiles, columns = (
        sum(measure(runs[f"{way}_{half}"], like.device).ms for way in ("forward", "backward"))
        for half in ("tiles", "columns")
    )
    area_of_tiles, area_of_columns = (density.double().sum().item() for density in densities(layer.p.index))
    return (columns / area_of_columns) / (tiles / area_of_tiles)
