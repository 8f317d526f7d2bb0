"""Full causal attention, as the sparse index that selects everything: the control of every experiment."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtraining.kernel import SparseIndex, dense_index
from mtraining.pattern.base import Pattern, SequenceShard


@dataclass(frozen=True)
class Dense(Pattern):
    name = "dense"

    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        return dense_index(q.shape[0], q.shape[2], shard.seq_len, self.block_size, q.device)
