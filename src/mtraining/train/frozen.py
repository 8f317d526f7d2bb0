"""Which weights a low-rank adapter stands on: a fingerprint that no number of ranks changes.

A checkpoint holds what is trained. An adapter over other weights than it was trained with would compute nonsense, so
the checkpoint says which they were.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_CHUNK = 1 << 22  # numbers that are looked at together, of 8 bytes each
_MODULUS = 1 << 40  # sums over a million ranks stay within 64 bits


def frozen_weights(model: nn.Module, process: Any = None) -> str:
    """The fingerprint of all parameters that are not trained; "" where all are. Collective where they are sharded.

    Weights count as bf16 has them, so that a change of `model.dtype` is none of the weights.

    Args:
        model: its names may have the prefix that `ParallelLM` adds.
        process: sums over all ranks by its ``sum``; None for whole parameters.
    """
    frozen = {
        name.removeprefix("hf_model."): parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    if not frozen:
        return ""
    sums = torch.stack([_weighted_sum(parameter.detach()) for parameter in frozen.values()])
    if process is not None:
        sums = process.sum(sums)
    hashed = xxhash.xxh3_64()
    for (name, parameter), number in zip(frozen.items(), sums.remainder(_MODULUS).tolist(), strict=True):
        hashed.update(f"{name} {tuple(parameter.shape)} {number}\n".encode())
    return hashed.hexdigest()


def _weighted_sum(weights: torch.Tensor) -> torch.Tensor:
    """The sum of this rank's numbers, each times an odd number of its own place; 0-d int64 below the modulus."""
    start = 0
    if isinstance(weights, DTensor):
        _, offset = compute_local_shape_and_global_offset(
            weights.shape, weights.device_mesh, weights.placements
        )
        start = offset[0] * math.prod(weights.shape[1:]) if weights.ndim else 0
        weights = weights.to_local()
    total = torch.zeros((), dtype=torch.int64, device=weights.device)
    for number, part in enumerate(weights.flatten().split(_CHUNK)):
        first = start + number * _CHUNK
        places = torch.arange(first, first + part.numel(), device=part.device)
        total += (part.to(torch.bfloat16).view(torch.int16).long() * (2 * places + 1)).sum()
    return total.remainder(_MODULUS)
