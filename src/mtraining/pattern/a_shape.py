"""A-shape, or streaming: the first tokens and a local window, whatever the input.

StreamingLLM (arXiv 2309.17453, section 3.2) keeps a few *attention sinks* and the most recent tokens; MInference (arXiv
2407.02490, section 3.1) names the same set of entries A-shape. Nothing is estimated and nothing is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.diagonals import distances_to_diagonals


@dataclass(frozen=True)
class AShape(Pattern):
    """Sinks and a window; the defaults are those of MInference's streaming baseline.

    The window is executed on whole blocks, so up to one block more than asked is kept on either edge.

    Attributes:
        sinks: first tokens, which every query reads.
        window: nearest distances, 0 .. window - 1.
    """

    sinks: int = 1024
    window: int = 4096

    name = "a_shape"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "sinks", self.sinks >= 0, "use zero or more tokens")
        require(self, "window", self.window >= 1, "use at least 1, so that every token sees itself")

    @torch.no_grad()
    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        seq_len, heads = shard.seq_len, (q.shape[0], q.shape[2])
        near = torch.arange(min(self.window, seq_len), device=q.device)
        diagonals = distances_to_diagonals(near[None], seq_len, self.block_size)
        columns = torch.arange(min(self.sinks, seq_len), dtype=torch.int32, device=q.device)
        return SparseIndex(
            seq_len,
            self.block_size,
            diagonals.expand(*heads, -1).contiguous(),
            columns.expand(*heads, -1).contiguous(),
        )
