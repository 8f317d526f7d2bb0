"""Batches of other people's collators, dealt to context-parallel ranks by the layout.

Packed documents are told as transformers takes them: by position ids that begin anew at 0 in each document.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtraining.errors import UserError
from mtraining.layout import Layout

IGNORED = -100


class Dealt(NamedTuple):
    """This rank's tokens: input ids, position ids and shifted labels, each (batch, local tokens) int64.

    ``starts`` is int32 (batch, tokens of the whole sequence), the first position of each token's document. None where
    each sequence is one.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    starts: Tensor | None


def shifted(labels: Tensor) -> Tensor:
    """The label of each token: its successor's, and none for the last. (batch, seq) int64 both."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED)


class Dealer:
    """Cuts batches of whole sequences by a layout.

    Args:
        layout: who holds which tokens.
        block_sizes: of all patterns; sequences are padded to whole blocks on every rank.
        rank, world: the place in the ring.

    Attributes:
        longest: tokens of a sequence at most where gradients are computed; None has no limit.
    """

    def __init__(self, layout: Layout, block_sizes: set[int], rank: int, world: int) -> None:
        self.layout, self.rank, self.world = layout, rank, world
        self.longest: int | None = None
        self.multiple = math.lcm(*(layout.multiple(world, size) for size in block_sizes))

    def deal(self, inputs: Mapping[str, Any]) -> Dealt:
        """This rank's part. Padding goes to the right, where no token with a label sees it.

        Args:
            inputs: ``input_ids`` and ``labels``, (batch, seq) int64, not shifted, as causal models of transformers take
                them; ``attention_mask`` and ``position_ids`` where there are any.

        Raises:
            UserError: no labels, padding on the left, a mask that is no padding, or a sequence that is too long. Also
                position ids that do not count from 0 in each document.
        """
        ids, labels = inputs["input_ids"], inputs.get("labels")
        if labels is None:
            raise UserError("labels: the batch has none; use a data collator that makes them.")
        if self.longest is not None and torch.is_grad_enabled() and ids.shape[1] > self.longest:
            raise UserError(
                f"seq_len={self.longest}: a batch has sequences of {ids.shape[1]} tokens, for which recompute='auto' "
                "left no room; give ContextParallelConfig a larger seq_len, or truncate."
            )
        _refuse_mask(inputs.get("attention_mask"))
        more = -ids.shape[1] % self.multiple
        token = torch.arange(ids.shape[1] + more, device=ids.device).expand(len(ids), -1)
        starts = _starts(inputs.get("position_ids"), ids)
        if starts is not None:  # padding is a document of its own
            starts = torch.cat([starts, starts.new_full((len(ids), more), ids.shape[1])], 1)
        positions = token if starts is None else token - starts
        whole = (pad(ids, (0, more)), positions, pad(shifted(labels), (0, more), value=IGNORED))
        ids, positions, labels = (self.layout.shard(part, self.rank, self.world) for part in whole)
        return Dealt(ids, positions, labels, None if starts is None else starts.int())


def _starts(given: Tensor | None, ids: Tensor) -> Tensor | None:
    """The first position of each token's document, int64 like ``ids``; None where each sequence is one document.

    Args:
        given: position ids that count from 0 in every document; (batch or 1, seq) int64.

    Raises:
        UserError: position ids that count otherwise.
    """
    if given is None:
        return None
    token = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if given.shape[-1] != ids.shape[1] or given.ndim != 2:
        raise UserError(
            f"position_ids: shape {tuple(given.shape)} does not fit input_ids {tuple(ids.shape)}."
        )
    starts = torch.where(given.expand_as(ids) == 0, token, 0).cummax(1).values
    if bool((given != token - starts).any()):
        raise UserError(
            "position_ids: they do not count from 0 in each document, so where documents begin is not known; use a "
            "collator that lets them, or leave them out."
        )
    return starts if bool((starts > 0).any()) else None


def _refuse_mask(mask: Any) -> None:
    if mask is None:
        return
    if mask.ndim != 2:
        raise UserError(
            f"attention_mask: shape {tuple(mask.shape)} is no mask of padding; leave it out of the batch."
        )
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise UserError(
            "attention_mask: the batch is padded on the left, where every token would see the padding; set the "
            "tokenizer's padding_side to right."
        )
