"""What query-aware FlexPrefill is made of: a distance of distributions, and the heaviest pairs of a whole map."""

from __future__ import annotations

import torch
from torch import Tensor

from mtraining.pattern.base import Collective


def jensen_shannon_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural log) of distributions over the last dimension."""
    middle = (p + q) / 2

    def divergence(x: Tensor) -> Tensor:
        return (torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1)

    return ((divergence(p) + divergence(q)) / 2).clamp(min=0).sqrt()


def heaviest_pairs(
    weights: Tensor, share: float, total: float | Tensor, comm: Collective, document: Tensor | None = None
) -> Tensor:
    """The fewest entries over all rows and ranks whose weights sum to ``share * total``: bool, like ``weights``.

    Entries equal to the lightest chosen one are all chosen. Non-negative floats are ordered as their bits are, so the
    cut is found from its highest bits down, two at a time. Each time the summed weight from a candidate up decides.
    This is exact and takes no sort and no host synchronisation.

    Args:
        weights: (batch, heads, rows, n), this rank's rows, fp32 or fp64, from 0 to 1.
        total: sum of all weights of a head over all ranks; with documents (batch, 1, documents), of each.
        document: bool (batch, rows, documents), which document each row belongs to, if any. Each then has a cut of its
            own. None: one for all rows.
    """
    if share >= 1:
        return torch.ones_like(weights, dtype=torch.bool)
    integer = torch.int64 if weights.dtype == torch.float64 else torch.int32
    bits = weights.contiguous().view(integer)
    of_row: Tensor | None = None
    cut = bits.new_zeros(*weights.shape[:2], 1)
    if document is not None:
        cut = cut.expand(-1, -1, document.shape[2])
        number = torch.arange(document.shape[2], device=bits.device)
        of_row = (document * number).sum(-1)[:, None].expand(*bits.shape[:3])
    # The sign bit is 0 throughout, and so is the next: it would make a weight of 2 or more.
    for shift in range(torch.iinfo(integer).bits - 4, -1, -2):
        candidates = [cut + (step << shift) for step in range(1, 4)]
        reached = [_reached(weights, bits >= _of_rows(c, of_row), document) for c in candidates]
        enough = comm.all_sum(torch.stack(reached)) >= share * total
        cut = cut + (enough.sum(0, dtype=integer) << shift)
    return bits >= _of_rows(cut, of_row)


def _of_rows(cut: Tensor, of_row: Tensor | None) -> Tensor:
    """Each row's cut, (batch, heads, rows or 1, 1), from those of documents."""
    return (cut if of_row is None else cut.gather(2, of_row))[..., None]


def _reached(weights: Tensor, chosen: Tensor, document: Tensor | None) -> Tensor:
    """Chosen weight of each document: fp64 (batch, heads, documents), or of all rows together (batch, heads, 1)."""
    if document is None:
        return (weights * chosen).sum((-2, -1), dtype=torch.float64)[..., None]
    rows = (weights * chosen).sum(-1, dtype=torch.float64)
    return torch.einsum("bhr,brd->bhd", rows, document.double())
