"""Rotary embeddings whose frequencies depend on the length of the sequence, given one length for all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mtraining.model.support import LENGTH_ROPE_TYPES


def fix_rope(hf_model: Any, seq_len: int) -> None:
    """Fix the frequencies of rotary embeddings that take them from the length of each forward, in place.

    They get those of ``seq_len``. Such are of the types ``longrope`` (Phi-3) and ``dynamic``; others stay as they are.
    The config, and so an export, keeps its type: plain transformers chooses the same at this length. Call it again for
    another length.

    Args:
        hf_model: a transformers model.
        seq_len: tokens of the whole sequence, over all ranks.
    """
    for module in hf_model.modules():
        kind = getattr(module, "mtraining_rope_type", getattr(module, "rope_type", None))
        if isinstance(kind, str) and kind in LENGTH_ROPE_TYPES:
            frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](
                module.config, module.inv_freq.device, seq_len=seq_len
            )
            module.inv_freq, module.attention_scaling = frequencies, scaling
            # transformers looks at the type in every forward, and chooses by it.
            module.mtraining_rope_type, module.rope_type = kind, "default"
            module.mtraining_rope_length = seq_len


@contextmanager
def rope_fixed(hf_model: Any, seq_len: int) -> Iterator[None]:
    """`fix_rope` inside; afterwards the length that was fixed before."""
    lengths = [getattr(module, "mtraining_rope_length", None) for module in hf_model.modules()]
    before = next((length for length in lengths if length is not None), None)
    fix_rope(hf_model, seq_len)
    try:
        yield
    finally:
        if before is not None:
            fix_rope(hf_model, before)
