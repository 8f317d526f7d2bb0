"""What columns cost beside tiles on this machine: the price that `mtraining calibrate` searches with."""

from __future__ import annotations

from torch import Tensor

from mtraining.bench.attention.cases import Case
from mtraining.bench.attention.problem import Layer, build
from mtraining.bench.timing import measure
from mtraining.kernel import select_backend


def column_price(shape: tuple[int, int, int], tokens: int, block_size: int, like: Tensor) -> float:
    """What an entry of a column costs on this machine's kernel, forward and backward, beside an entry of a tile.

    Measured on random tensors under a random index of some tiles, with and without some columns; areas are counted as
    :meth:`mtraining.kernel.SparseIndex.computed_area` counts them.

    Args:
        shape: q_heads, kv_heads, head_dim.
        like: a tensor of the device and dtype that attention will have.
    """
    some = max(block_size, min(2048, tokens // 8))
    blocks = max(2.0, min(26.0, tokens / block_size / 8))
    backend = select_backend("auto", like.device, like.dtype, shape[2])
    times, areas = [], []
    for columns in (0, some):
        case = Case(tokens, *shape, blocks, columns, block_size=block_size, dtype=like.dtype)
        layer = Layer(backend, build(case, like.device, seed=0))
        times.append(sum(measure(run, like.device).ms for run in layer.phases().values()))
        areas.append(layer.p.index.cost().sum().item())
    return ((times[1] - times[0]) / (areas[1] - areas[0])) / (times[0] / areas[0])
