"""Eager versions of what a pattern's estimation and the column pass need around attention itself."""

from __future__ import annotations

import torch
from torch import Tensor


def _probe_scores(
    probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float
) -> Tensor:
    """(batch, q_heads, probe, keys), -inf in a query's future; fp32, or fp64 for fp64 inputs."""
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    batch, count, q_heads, dim = probe.shape
    kv_heads = k.shape[2]
    grouped = probe.to(dtype).view(batch, count, kv_heads, q_heads // kv_heads, dim)
    scores = torch.einsum("bpkgd,bskd->bkgps", grouped, k.to(dtype)).flatten(1, 2) * scale
    return scores.masked_fill_(key_positions[None, :] > probe_positions[:, None], -torch.inf)


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


class ReferenceEstimation:
    """The estimation half of :class:`mtraining.kernel.backend.Backend`, eager."""

    def probe_lse(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float
    ) -> Tensor:
        return _probe_scores(probe, k, probe_positions, key_positions, scale).logsumexp(-1)

    def probe_mass(
        self, probe: Tensor, k: Tensor, probe_positions: Tensor, key_positions: Tensor, scale: float, lse: Tensor,
        seq_len: int, block_size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        prob = _probe_scores(probe, k, probe_positions, key_positions, scale).sub_(lse[..., None]).exp_()
        distance = (probe_positions[:, None] - key_positions[None, :]).clamp(
            min=0
        )  # the future carries no mass
        rows = prob.flatten(0, 1)
        slashes = prob.new_zeros(rows.shape[0], seq_len)
        slashes.scatter_add_(1, distance.flatten().expand(rows.shape[0], -1), rows.flatten(1))
        return rows.sum(1), diagonal_mass(slashes, block_size)

    def heaviest(self, mass: Tensor, forced: Tensor, top_p: float | None, keep: int) -> Tensor:
        n = mass.shape[1]
        order = (
            torch.where(forced, torch.inf, mass)
            .sort(dim=1, descending=True, stable=True)
            .indices[:, : min(keep, n)]
        )
        if top_p is not None:
            ranked = mass.gather(1, order)
            before = ranked.cumsum(1) - ranked
            wanted = (before < top_p * mass.sum(1, keepdim=True)) | forced[order]
            order = torch.where(wanted, order, n)
        return order.sort(dim=1).values

    def gather_columns(self, k: Tensor, v: Tensor, columns: Tensor, slots: Tensor) -> Tensor:
        batch, q_heads, _ = columns.shape
        where, held = _column_slots(columns, slots)
        row = torch.arange(batch, device=k.device)[:, None, None]
        head = torch.arange(q_heads, device=k.device)[:, None] // (q_heads // k.shape[2])
        packed = torch.stack([x[row, where, head].transpose(1, 2) for x in (k, v)])
        return torch.where(
            held.transpose(1, 2)[..., None], packed, torch.zeros((), dtype=k.dtype, device=k.device)
        ).contiguous()  # collectives ask for it

    def scatter_columns(self, grads: Tensor, columns: Tensor, slots: Tensor, dkv: Tensor) -> None:
        q_heads, kv_heads = columns.shape[1], dkv.shape[3]
        where, held = _column_slots(columns, slots)
        for grad, total in zip(grads, dkv, strict=True):
            kept = torch.where(
                held.transpose(1, 2)[..., None], grad, torch.zeros((), dtype=grad.dtype, device=grad.device)
            )
            for h in range(q_heads):
                into = where[:, h, :, None].expand(-1, -1, grad.shape[-1])
                total[:, :, h // (q_heads // kv_heads)].scatter_add_(1, into, kept[:, :, h])


def _column_slots(columns: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Local place of each column (0 where absent) and whether this rank holds it: (batch, q_heads, capacity) both."""
    seq_len = slots.numel()
    where = torch.where(columns < seq_len, slots[columns.clamp(max=seq_len - 1).long()], -1)
    return where.clamp(min=0), where >= 0
