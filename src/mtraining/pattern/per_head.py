"""A pattern for each query head: what a table of budgets, searched or published, makes of a layer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel import SparseIndex
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.vertical_slash import VerticalSlash, estimate_by_head


@dataclass(frozen=True)
class PerHead(Pattern):
    """One pattern for each query head, all of one block size.

    Heads of equal patterns are estimated together, and so are vertical-slash heads that share a probe, whatever their
    budgets: a layer of them costs one estimate.

    Attributes:
        heads: the patterns, in the order of the query heads.
    """

    heads: tuple[Pattern, ...] = ()

    name = "per_head"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "heads", len(self.heads) > 0, "give one pattern for each query head")
        for head, pattern in enumerate(self.heads):
            if pattern.block_size != self.block_size:
                raise UserError(
                    f"pattern.block_size: head {head} has {pattern.block_size} and the layer {self.block_size}; "
                    "give all heads of a layer one block size."
                )

    def check_heads(self, layer: int, q_heads: int) -> None:
        if len(self.heads) != q_heads:
            raise UserError(
                f"pattern table: layer {layer} has {len(self.heads)} heads there and {q_heads} in the model; use a "
                "table made for this model."
            )

    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        q_heads = q.shape[2]
        if len(self.heads) != q_heads:
            raise UserError(
                f"pattern: {len(self.heads)} heads have patterns but q has {q_heads}; give one each."
            )
        groups: dict[Hashable, list[int]] = {}
        for head, pattern in enumerate(self.heads):
            groups.setdefault(_shared(pattern, shard), []).append(head)
        parts = [(heads, self._estimate_group(heads, q, k, shard, scale)) for heads in groups.values()]
        return parts[0][1] if len(parts) == 1 else merge_heads(parts, q_heads)

    def _estimate_group(
        self, heads: list[int], q: Tensor, k: Tensor, shard: SequenceShard, scale: float
    ) -> SparseIndex:
        if len(heads) < q.shape[2]:
            group = q.shape[2] // k.shape[2]
            kv_heads = tuple(head // group for head in heads)
            q, k = q[:, :, _on_device(tuple(heads), q.device)], k[:, :, _on_device(kv_heads, q.device)]
        patterns = [self.heads[head] for head in heads]
        vertical_slash = tuple(pattern for pattern in patterns if isinstance(pattern, VerticalSlash))
        if vertical_slash:
            return estimate_by_head(q, k, shard, scale, vertical_slash)
        return patterns[0].estimate(q, k, shard, scale)


def _shared(pattern: Pattern, shard: SequenceShard) -> Hashable:
    """Heads with equal values of this can share one estimate."""
    if isinstance(pattern, VerticalSlash):
        # Places of a document's slashes differ by what the slashes are.
        unit = pattern.slash_by if shard.apart else None
        return VerticalSlash, pattern.probe, pattern.probe_at, unit
    return pattern


def merge_heads(parts: Sequence[tuple[list[int], SparseIndex]], q_heads: int) -> SparseIndex:
    """One index from indices of some heads each: a list of (head numbers, their index), covering every head once."""
    first = parts[0][1]
    batch, device = first.diagonals.shape[0], first.diagonals.device
    width = max(index.columns.shape[-1] for _, index in parts)
    diagonals = first.diagonals.new_empty(batch, q_heads, first.num_blocks)
    columns = torch.full((batch, q_heads, width), first.seq_len, dtype=torch.int32, device=device)
    listed = [index for _, index in parts if index.blocks is not None]
    blocks = None
    if listed and listed[0].blocks is not None:
        rows = listed[0].blocks
        blocks = rows.new_zeros(batch, q_heads, *rows.shape[2:])
    for heads, index in parts:
        places = _on_device(tuple(heads), device)
        diagonals[:, places] = index.diagonals
        columns[:, places, : index.columns.shape[-1]] = index.columns
        if blocks is not None and index.blocks is not None:
            blocks[:, places] = index.blocks
    return SparseIndex(
        first.seq_len,
        first.block_size,
        diagonals,
        columns,
        blocks,
        listed[0].block_rows if listed else None,
    )


@lru_cache(maxsize=256)
def _on_device(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Head numbers as an index, made once: a copy to the device would wait for it at every call."""
    return torch.tensor(heads, device=device)
