"""What a model makes of its head's product before the softmax: a factor, and a soft cap.

    logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap)

Cohere multiplies by ``logit_scale``, Granite and MiniCPM divide by ``logits_scaling``, Gemma 2 and later cap. The form
is read from the config, where each family has a name of its own for it: a dry build on the meta device knows it too.
`mtraining.model.support` asks the model itself whether the form is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FACTORS = (
    "logit_scale",
    "logits_scale",
    "logits_mup_width_multiplier",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Fields of configs by which logits are multiplied."""
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "final_logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LogitForm:
    """How logits come from the head's product.

    Attributes:
        scale: factor.
        cap: bound of the absolute value after the factor, by tanh; None for none.
    """

    scale: float = 1.0
    cap: float | None = None

    @staticmethod
    def of_fields(fields: Mapping[str, Any]) -> LogitForm:
        """As the fields of a config say, by any of their names."""
        scale = 1.0
        for name in FACTORS:
            scale *= float(1 if fields.get(name) is None else fields[name])
        for name in DIVISORS:
            scale /= float(fields.get(name) or 1)
        caps = [float(fields[name]) for name in CAPS if fields.get(name)]
        return LogitForm(scale, caps[0] if caps else None)

    def __call__(self, product: Tensor) -> Tensor:
        """Logits in fp32 (fp64 for fp64), of any shape."""
        return shaped(product, self.scale, self.cap)


PLAIN = LogitForm()


def shaped(product: Tensor, scale: float, cap: float | None) -> Tensor:
    """What `LogitForm` does, for compiled code; the product itself where it is wide and its form is plain."""
    logits = product.to(wide(product.dtype))
    if scale != 1:
        logits = logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


class Head(NamedTuple):
    """The parts of a language model's head, whole.

    weight: (vocabulary, hidden size).
    bias: (vocabulary,), None for none.
    form: what follows the product.
    """

    weight: Tensor
    bias: Tensor | None = None
    form: LogitForm = PLAIN

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., hidden size) -> (..., vocabulary) in fp32 (fp64 for fp64)."""
        return self.form(product(hidden, self.weight, self.bias))


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias``, in one pass where there is a bias."""
    return torch.nn.functional.linear(hidden, weight, bias)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and of sums: fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
