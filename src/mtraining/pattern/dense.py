"""Full causal attention, as the sparse index that selects everything: the control of every experiment."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtraining.kernel import SparseIndex, dense_index
from mtraining.pattern.base import Pattern, SequenceShard


@dataclass(frozen=True)
class Dense(Pattern):
    """Every causal block of every head.

    In contiguous and zigzag layouts ``kernel=auto`` computes it with dense kernels; as a baseline, use zigzag, which
    balances it over ranks and steps. In striped ones it runs as tiles, which takes about half as long again.
    """

    name = "dense"

    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        return dense_index(q.shape[0], q.shape[2], shard.seq_len, self.block_size, q.device)
