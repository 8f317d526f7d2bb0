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


def heaviest_diagonals(mass: Tensor, forced: Tensor, top_p: float | None, density: float) -> Tensor:
    """Block diagonals by mass, heaviest first, while the tiles they are made of fit the budget.

    Diagonal d of n has n - d tiles. Forced diagonals come first, count towards budget and mass, and are kept even where
    they alone exceed the budget. The first diagonal that does not fit ends the selection.

    Args:
        mass: (rows, n), non-negative.
        forced: bool (n,), always kept.
        top_p: stop as soon as this share of the row's mass is reached; None spends the whole budget.
        density: the budget, as a share of the n (n + 1) / 2 causal tiles.

    Returns:
        bool (rows, n).
    """
    n = mass.shape[1]
    order = torch.where(forced, torch.inf, mass).sort(dim=1, descending=True, stable=True).indices
    wanted = (n - order).cumsum(1) <= density * n * (n + 1) / 2
    if top_p is not None:
        before, total = _running(mass.gather(1, order))
        wanted &= before < top_p * total
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, order, wanted | forced[order])


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
