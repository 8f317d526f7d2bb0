"""AdamW and the global gradient norm, for plain and for sharded (DTensor) parameters alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from mtraining.train.config import TrainSection


def build_optimizer(model: nn.Module, options: TrainSection, device: torch.device) -> torch.optim.AdamW:
    """AdamW over every trainable parameter; weight decay spares vectors (norms and biases). Fused on CUDA."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        fused=device.type == "cuda",
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set one learning rate for every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients over all ranks, an fp32 scalar equal on every rank. Collective when sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[nn.Parameter], norm: torch.Tensor, limit: float | None) -> None:
    """Scale all gradients so that their global norm is at most `limit`; None leaves them alone."""
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
