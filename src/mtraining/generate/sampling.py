"""The next token from logits: the most likely one, or one drawn at a temperature from the most likely few.

Nothing waits for the device. Draws are made beforehand, of a generator for each row: what a row gets does not depend on
the rows beside it, nor on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtraining.errors import UserError


class Chooser:
    """Chooses one token a row and step.

    Args:
        temperature: 0 takes the most likely token (the first of equals).
        top_p: draws are from the fewest tokens whose probability reaches this share.
        seeds: of each row's draws.
        steps: tokens that will be chosen at most.

    Raises:
        UserError: a temperature or top_p out of range.
    """

    def __init__(
        self, temperature: float, top_p: float, seeds: Sequence[int], steps: int, device: torch.device
    ) -> None:
        if not 0 <= temperature < float("inf"):
            raise UserError(
                f"temperature: {temperature} is no temperature; use 0 for greedy decoding, or a number above it."
            )
        if not 0 < top_p <= 1:
            raise UserError(f"top_p: {top_p} is no share; use a number above 0, up to 1.")
        if temperature == 0 and top_p != 1:
            raise UserError(
                f"top_p: {top_p} has no effect at temperature 0, which is greedy; set a temperature above 0, or "
                "leave top_p out."
            )
        self._temperature, self._top_p = temperature, top_p
        if temperature > 0:
            rows = [
                torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                for seed in seeds
            ]
            self._draws = torch.stack(rows).to(device)

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """int64 (batch,) tokens from (batch, vocabulary) logits."""
        if self._temperature == 0:
            return logits.argmax(-1)
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        prob = (ranked.double() / self._temperature).softmax(-1)
        upto = prob.cumsum(-1)
        kept = upto - prob < self._top_p  # the most likely token always is
        drawn = self._draws[:, step, None] * (prob * kept).sum(-1, keepdim=True)
        place = torch.searchsorted(upto, drawn, right=True).minimum(kept.sum(-1, keepdim=True) - 1)
        return order.gather(-1, place)[:, 0]
