"""Packed sequences of small models, and what each of their documents gives when it is trained on alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import SEQ_LEN, VOCAB, Batch
from torch import Tensor
from torch.nn.functional import cross_entropy

# Rows of SEQ_LEN tokens: at blocks and elsewhere, long and of one token; the last entry of a row is padding.
DOCUMENTS = ([37, 64, 3, 1, 11, 12], [8, 96, 13, 11], [127, 1], [40, 24, 1, 1, 30, 32])


@dataclass
class PackedBatch(Batch):
    """Documents of random tokens; starts is int32 (batch, SEQ_LEN)."""

    starts: Tensor
    lengths: Sequence[Sequence[int]]

    def documents(self) -> list[tuple[int, slice]]:
        """The row and place of every document, padding left out."""
        found = []
        for row, lengths in enumerate(self.lengths):
            begin = 0
            for length in lengths[:-1]:
                found.append((row, slice(begin, begin + length)))
                begin += length
        return found


def packed_batch(rows: int = 4) -> PackedBatch:
    """Labels within each document; some others ignored as well; none in padding."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (rows, SEQ_LEN), generator=generator)
    labels, starts = torch.full_like(tokens, -100), torch.zeros(rows, SEQ_LEN, dtype=torch.int32)
    batch = PackedBatch(tokens, torch.zeros_like(tokens), labels, starts, DOCUMENTS[:rows])
    for row, lengths in enumerate(batch.lengths):
        begin = 0
        for length in lengths:
            starts[row, begin : begin + length] = begin
            begin += length
        assert begin == SEQ_LEN
    batch.position_ids = torch.arange(SEQ_LEN) - starts.long()
    for row, place in batch.documents():
        labels[row, place.start : place.stop - 1] = tokens[row, place.start + 1 : place.stop]
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    return batch


def alone(model: Any, batch: PackedBatch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of plain transformers that reads one document after another: the mean over all labels."""
    model.set_attn_implementation("eager")
    total = 0.0
    for row, place in batch.documents():
        logits = model(batch.input_ids[row : row + 1, place], use_cache=False).logits[0]
        loss = cross_entropy(logits, batch.labels[row, place], reduction="sum") / batch.num_labels
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}
