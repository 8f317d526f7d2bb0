"""Block diagonals: what executes a slash, and what their mass is."""

from __future__ import annotations

import torch
from torch import Tensor


def distances_to_diagonals(distances: Tensor, seq_len: int, block_size: int) -> Tensor:
    """Token distances -> the block diagonals that contain them.

    Distance 128 a + b crosses block diagonal a, and a + 1 as well when b > 0 (METHOD.md section 2).

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


def diagonal_mass(slashes: Tensor, block_size: int) -> Tensor:
    """Mass of each block diagonal, from that of each token distance.

    A pair at distance 128 a + b lies on block diagonal a + 1 if its query is among the first b of its block, else on a.
    A slash has such pairs at every place of a block alike, so a share b / 128 of its mass goes to a + 1: where in
    their blocks the probe's few queries happen to stand does not matter.

    Args:
        slashes: (rows, seq_len), mass of each distance.

    Returns:
        (rows, seq_len // block_size); what would fall beyond the last diagonal is left out.
    """
    place = torch.arange(block_size, device=slashes.device, dtype=slashes.dtype) / block_size
    own, next_one = (slashes.unflatten(1, (-1, block_size)) @ torch.stack([1 - place, place], 1)).unbind(-1)
    return own + torch.nn.functional.pad(next_one, (1, -1))


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
        ranked = mass.gather(1, order)
        wanted &= ranked.cumsum(1) - ranked < top_p * mass.sum(1, keepdim=True)
    return torch.zeros_like(mass, dtype=torch.bool).scatter_(1, order, wanted | forced[order])
