"""Eager kernels of the estimation: the specification of the fused ones."""

from __future__ import annotations

import torch
from torch import Tensor

from mtraining.kernel.backend import ProbeScope


def _probe_scores(
    probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float,
    scope: ProbeScope | None,
) -> Tensor:  # fmt: skip
    """(batch, q_heads, probe, keys), -inf for keys that a query may not see; fp32, or fp64 for fp64 inputs."""
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    batch, count, q_heads, dim = probe.shape
    kv_heads = k.shape[2]
    grouped = probe.to(dtype).view(batch, count, kv_heads, q_heads // kv_heads, dim)
    scores = torch.einsum("bpkgd,bskd->bkgps", grouped, k.to(dtype)).flatten(1, 2) * scale
    hidden = key_positions > probe_positions[..., None]
    if scope is not None:
        hidden = (hidden | (key_positions < scope.first_keys[..., None]))[:, None]
    return scores.masked_fill_(hidden, -torch.inf)


def diagonal_mass(slashes: Tensor, block_size: int) -> Tensor:
    """Mass of each block diagonal, from that of each token distance.

    A pair at distance 128 a + b lies on block diagonal a + 1 if its query is among the first b of its block. Else it
    lies on a.
    A slash has such pairs at every place of a block alike. So a share b / 128 of its mass goes to a + 1, wherever in
    their blocks the probe's few queries happen to stand.

    Args:
        slashes: (rows, seq_len), mass of each distance.

    Returns:
        (rows, seq_len // block_size); what would fall beyond the last diagonal is left out.
    """
    place = torch.arange(block_size, device=slashes.device, dtype=slashes.dtype) / block_size
    own, next_one = (slashes.unflatten(1, (-1, block_size)) @ torch.stack([1 - place, place], 1)).unbind(-1)
    return own + torch.nn.functional.pad(next_one, (1, -1))


def _scoped_mass(prob: Tensor, distance: Tensor, block_size: int, scope: ProbeScope) -> Tensor:
    """Mass by the scope's places: (batch * q_heads, slots).

    Args:
        prob: (batch, q_heads, probe, keys).
        distance: int64 (batch, probe, keys).
    """
    batch, heads = prob.shape[:2]
    total = prob.new_zeros(batch, heads, scope.slots + 1)  # the last place takes what is left out
    lower, share = distance // block_size, distance % block_size / block_size
    for slash, part in ((lower, 1 - share), (lower + 1, share)):
        place = torch.where(slash < scope.reach[..., None], scope.bases[..., None] + slash, scope.slots)
        place = place.flatten(1)[:, None].expand(-1, heads, -1)
        total.scatter_add_(2, place, (prob * part.to(prob.dtype)[:, None]).flatten(2))
    return total[..., : scope.slots].flatten(0, 1)


class ReferenceEstimation:
    """Implements :class:`mtraining.kernel.backend.EstimationKernels` in eager PyTorch."""

    def probe_lse(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float,
        scope: ProbeScope | None = None,
    ) -> Tensor:  # fmt: skip
        return _probe_scores(probe, k, probe_positions, key_positions, scale, scope).logsumexp(-1)

    def probe_mass(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float, lse: Tensor,
        seq_len: int, block_size: int, scope: ProbeScope | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scores = _probe_scores(probe, k, probe_positions, key_positions, scale, scope)
        # A query that sees no key has an lse of -inf and no mass.
        prob = scores.sub_(lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp_()
        # Keys that a query may not see carry no mass.
        distance = (probe_positions[..., None] - key_positions).clamp(min=0)
        rows = prob.flatten(0, 1)
        if scope is not None:
            return rows.sum(1), _scoped_mass(prob, distance, block_size, scope)
        slashes = prob.new_zeros(rows.shape[0], seq_len)
        slashes.scatter_add_(1, distance.flatten().expand(rows.shape[0], -1), rows.flatten(1))
        return rows.sum(1), diagonal_mass(slashes, block_size)

    def heaviest(self, mass: Tensor, forced: Tensor, top_p: float | None, keep: int) -> Tensor:
        n = mass.shape[1]
        weight = torch.where(forced, torch.inf, mass)
        order = weight.sort(dim=1, descending=True, stable=True).indices[:, : min(keep, n)]
        if top_p is not None:
            ranked = mass.gather(1, order)
            before = ranked.cumsum(1) - ranked
            wanted = (before < top_p * mass.sum(1, keepdim=True)) | forced[order]
            order = torch.where(wanted, order, n)
        return order.sort(dim=1).values
