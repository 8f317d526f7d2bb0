"""Fused norms and gated MLPs in shapes: what they save and allocate, for `mtraining.predict.memory`.

A fused norm saves its input and a number a row where the eager one saves copies in fp32; a fused gate saves the two
projections and makes their gradients in place. liger-kernel does so, and torch.compile about so. Rotary
embedding stays as it is: it saves nothing either way.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate, up


def fuse_shapes(model: nn.Module) -> None:
    """Put both into every norm and gated MLP of a meta model, in place."""
    for module in model.modules():
        parts = dict(module.named_children())
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(lambda self, x: _Norm.apply(x, self.weight), module)
        elif parts.keys() >= {"gate_proj", "up_proj", "down_proj"}:
            module.forward = MethodType(
                lambda self, x: self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x))), module
            )
