"""Train language models on very long contexts with dynamic sparse ring attention."""

from mtraining.ring import sparse_ring_attention

__all__ = ["sparse_ring_attention"]
