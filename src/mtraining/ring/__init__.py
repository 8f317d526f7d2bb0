"""How keys travel: topology, transfers, the autograd function that joins pattern, layout and kernel, and balance."""

from mtraining.ring.attention import sparse_ring_attention
from mtraining.ring.balance import Imbalance, imbalance, tile_work, tile_works
from mtraining.ring.links import prioritise_transfers, slow_links
from mtraining.ring.merge import merge_over_ring
from mtraining.ring.observe import AttentionStats, Observer, chosen
from mtraining.ring.op import AttentionRuntime, BatchStarts
from mtraining.ring.sinks import with_sinks
from mtraining.ring.tape import IndexTape
from mtraining.ring.timeline import RingTimes, Timeline
from mtraining.ring.topology import Ring

__all__ = [
    "AttentionRuntime",
    "AttentionStats",
    "BatchStarts",
    "Imbalance",
    "IndexTape",
    "Observer",
    "Ring",
    "RingTimes",
    "Timeline",
    "chosen",
    "imbalance",
    "merge_over_ring",
    "prioritise_transfers",
    "slow_links",
    "sparse_ring_attention",
    "tile_work",
    "tile_works",
    "with_sinks",
]
