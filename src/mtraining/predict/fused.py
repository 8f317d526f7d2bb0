"""Fused norms, gated MLPs and float8 products in shapes: what they save and allocate, for `mtraining.predict.memory`.

A fused norm saves its input and a number a row where the eager one saves copies in fp32; a fused gate saves the two
projections and makes their gradients in place. liger-kernel does so, and torch.compile about so. Rotary
embedding stays as it is: it saves nothing either way.

A compiled float8 product saves what an ordinary one does. It has copies of its operands in a byte a number: in forward
one of each, in backward the gradient in two directions. Where whole layers are compiled, their backward has more at a
time: on two H100 (Qwen2.5-3B, 64K tokens each, `rowwise`) 2.8 GiB beyond that, about two copies of the MLP's inner
activations. So each product counts two of its wider side.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mtraining.model.float8 import converts
from mtraining.model.support import layers_of


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


class _Float8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, whole: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias, ctx.whole = bias, whole
        copies = [_byte_each(x), _byte_each(weight)]
        out = x.new_empty(*x.shape[:-1], weight.shape[0])
        del copies
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wider = max(x, grads[0], key=torch.Tensor.numel)
        besides = [torch.empty_like(wider) for _ in range(2 * ctx.whole)]
        by_row, by_column, small = _byte_each(grads[0]), _byte_each(grads[0]), _byte_each(weight)
        dx = torch.empty_like(x)
        del by_row, small
        small = _byte_each(x)
        dweight = torch.empty_like(weight)
        del by_column, small, besides
        return dx, dweight, None if ctx.bias is None else torch.empty_like(ctx.bias), None


def _byte_each(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape, dtype=torch.uint8)


def float8_shapes(model: Any, whole: bool) -> None:
    """Put it into every linear layer of a meta model's decoder layers that `use_float8` converts, in place.

    Args:
        whole: whether whole layers are compiled.
    """
    for layer in layers_of(model):
        for module in layer.modules():
            if converts(module):
                module.forward = MethodType(
                    lambda self, x: _Float8.apply(x, self.weight, self.bias, whole), module
                )
