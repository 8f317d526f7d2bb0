"""A-shape, or streaming: the first tokens and a local window, whatever the input.

StreamingLLM (arXiv 2309.17453, section 3.2) keeps a few *attention sinks* and the most recent tokens; MInference (arXiv
2407.02490, section 3.1) names the same set of entries A-shape. Nothing is estimated and nothing is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex, pack_blocks
from mtraining.pattern.base import Pattern, SequenceShard, require
from mtraining.pattern.diagonals import distances_to_diagonals


@dataclass(frozen=True)
class AShape(Pattern):
    """Sinks and a window; the defaults are those of MInference's streaming baseline.

    The window is executed on whole blocks, so up to one block more than asked is kept on either edge. So are the sinks
    of documents that share a sequence.

    Attributes:
        sinks: first tokens of each document, which every query of it reads.
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
        diagonals = diagonals.expand(*heads, -1).contiguous()
        columns = torch.arange(min(self.sinks, seq_len), dtype=torch.int32, device=q.device)
        columns = columns.expand(*heads, -1)
        if not shard.apart or not self.sinks:
            return SparseIndex(seq_len, self.block_size, diagonals, columns.contiguous())
        # How many documents there are is not known here, and the list of columns has one length. So sinks are columns
        # where a document is alone in its sequence, and else tiles.
        documents, size = shard.documents, self.block_size
        assert documents is not None
        own = shard.all_blocks(size)[shard.comm.rank]
        first, tokens = documents.first[:, own * size], documents.sizes[:, own * size]
        key = torch.arange(seq_len // size, device=q.device)
        last = (first + tokens.clamp(max=self.sinks) - 1) // size
        tiles = (key >= (first // size)[..., None]) & (key <= last[..., None])
        alone = tokens == shard.length
        # Packed once, for all heads have the same.
        lists = pack_blocks(tiles & ~alone[..., None])[:, None].expand(-1, heads[1], -1, -1).contiguous()
        alone = documents.sizes[:, :1] == shard.length
        columns = torch.where(alone[..., None], columns, seq_len).int().contiguous()
        return shard.listed_index(size, lists, columns, diagonals)
