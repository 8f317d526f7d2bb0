"""Batches of other people's collators, dealt to context-parallel ranks by the layout."""

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
    """This rank's tokens: input ids, position ids and shifted labels, each (batch, local tokens) int64."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor


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
            UserError: no labels, padding on the left, a mask that is no padding, packed documents, or a sequence that
                is too long.
        """
        ids, labels = inputs["input_ids"], inputs.get("labels")
        if labels is None:
            raise UserError("labels: the batch has none; use a data collator that makes them.")
        if self.longest is not None and torch.is_grad_enabled() and ids.shape[1] > self.longest:
            raise UserError(
                f"seq_len={self.longest}: a batch has sequences of {ids.shape[1]} tokens, for which recompute='auto' "
                "left no room; give ContextParallelConfig a larger seq_len, or truncate."
            )
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        _refuse_mask(inputs.get("attention_mask"))
        given = inputs.get("position_ids")
        if given is not None and bool((given != positions).any()):
            raise UserError(
                "position_ids: they begin anew within a sequence, as those of packed documents do; attention would "
                "cross the documents, so use one document a sequence."
            )
        more = -ids.shape[1] % self.multiple
        positions = torch.arange(ids.shape[1] + more, device=ids.device).expand(len(ids), -1)
        whole = (pad(ids, (0, more)), positions, pad(shifted(labels), (0, more), value=IGNORED))
        return Dealt(*(self.layout.shard(part, self.rank, self.world) for part in whole))


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
