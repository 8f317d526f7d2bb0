"""Reading prompts on the ring and answering them: prefill, the sharded cache, decode, sampling."""

from mtraining.generate.attention import AttentionChoice, parse_attention
from mtraining.generate.generator import Generation, Generator, Scores

__all__ = ["AttentionChoice", "Generation", "Generator", "Scores", "parse_attention"]
