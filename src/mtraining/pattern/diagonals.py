"""Block diagonals: which ones execute a slash, and which ones a budget buys."""

from __future__ import annotations

import torch
from torch import Tensor


def distances_to_diagonals(distances: Tensor, seq_len: int, block_size: int) -> Tensor:
    """Token distances -> the block diagonals that contain them.

    Distance 128 a + b crosses block diagonal a, and a + 1 as well when b > 0 (docs/how/index-format.md).

    Args:
        distances: int64 (rows, n), padded with values >= seq_len.

    Returns:
        bool (rows, seq_len // block_size).
    """
    num_blocks = seq_len // block_size
    lower = distances // block_size
    upper = lower + (distances % block_size > 0)
    bits = torch.zeros(distances.shape[0], num_blocks + 1, dtype=torch.bool, device=distances.device)
    for block in (lower, upper):
        bits.scatter_(1, torch.where(distances < seq_len, block, num_blocks).clamp(max=num_blocks), True)
    return bits[:, :num_blocks].contiguous()


def heaviest_diagonals(
    mass: Tensor, forced: Tensor, top_p: float | None, density: float, tiles: Tensor | None = None
) -> Tensor:
    """Block diagonals by mass, heaviest first, while the tiles they are made of fit the budget.

    Forced diagonals come first, count towards budget and mass, and are kept even where
    they alone exceed the budget. The first diagonal that does not fit ends the selection.

    Args:
        mass: (rows, n), non-negative.
        forced: bool (n,), always kept.
        top_p: stop as soon as this share of the row's mass is reached; None spends the whole budget.
        density: the budget, as a share of all tiles.
        tiles: int64 (rows, n), tiles of each diagonal; None: diagonal d of n has n - d.

    Returns:
        bool (rows, n).
    """
    n = mass.shape[1]
    order = torch.where(forced, torch.inf, mass).sort(dim=1, descending=True, stable=True).indices
    if tiles is None:
        wanted = (n - order).cumsum(1) <= density * n * (n + 1) / 2
    else:
        wanted = tiles.gather(1, order).cumsum(1) <= density * tiles.sum(1, keepdim=True).double()
    if top_p is not None:
        before, total = _running(mass.gather(1, order))
        wanted &= before < top_p * total
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, order, wanted | forced[order])


def tiles_by_diagonal(starts: Tensor, seq_len: int, block_size: int) -> Tensor:
    """Tiles of each block diagonal that starts leave of the first ``seq_len`` tokens: int64 (batch, blocks).

    Args:
        starts: integers (batch, at least seq_len), the first key that each query may attend.
    """
    block = torch.arange(seq_len // block_size, device=starts.device)
    # The farthest diagonal of each row of blocks.
    reach = block - starts[:, :seq_len:block_size] // block_size
    rows = torch.zeros_like(reach).scatter_add_(1, reach, torch.ones_like(reach))
    return rows.flip(1).cumsum(1).flip(1)


def _running(mass: Tensor) -> tuple[Tensor, Tensor]:
    """What stands before each entry of a row, and its total, in units of about 2^-50 of that.

    Sums of integers: CUDA adds a single row of floats, as a rank has that owns one head, in no fixed order.

    Returns:
        fp64 (rows, n), (rows, 1).
    """
    exponent = torch.frexp(mass.sum(1, keepdim=True)).exponent
    units = (mass.double() * torch.exp2((50 - exponent).double())).long()
    upto = units.cumsum(1)
    return (upto - units).double(), upto[:, -1:].double()
