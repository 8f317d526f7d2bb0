"""In which form a parameter has AdamW's two moments, and how many bytes they take.

`8bit` has blocks of numbers that share a scale. They lie within rows of the first dimension, along which FSDP shards.
So a block is whole on one rank however many ranks there are, and a checkpoint fits any number of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

FULL, EIGHT_BITS, OFFLOAD = MOMENTS = "full", "8bit", "offload"
# Numbers of a block, best first: a scale takes four bytes.
BLOCKS = (256, 128, 64)
# Parameters with fewer numbers than this keep fp32, as in bitsandbytes and torchao.
LEAST = 4096
# Numbers that are updated at one time: what the update has beside the moments is of so many.
CHUNK = 2**22
# Most bytes that an update has for each number of a chunk, eager: codes are found in int64.
_WORK_8BIT = 72
# Chunks of two moments that are on the device at one time: one arrives, one is updated, one leaves.
SLOTS = 3


def block_of(shape: torch.Size) -> int | None:
    """Numbers of a block in 8 bits; None where a parameter of this shape keeps its moments in fp32."""
    if len(shape) < 2 or shape.numel() < LEAST:
        return None
    row = shape.numel() // shape[0]
    return next((size for size in BLOCKS if row % size == 0), None)


def rows_at_once(shape: torch.Size) -> int:
    """Rows of a parameter that are updated at one time."""
    return max(1, CHUNK * shape[0] // max(1, shape.numel())) if len(shape) > 0 and shape[0] else 1


def moment_bytes(form: str, parameters: Iterable[nn.Parameter]) -> tuple[float, float]:
    """Bytes of both moments of whole parameters: (on the device, in host memory)."""
    device = host = 0.0
    for parameter in parameters:
        numbers, block = parameter.numel(), block_of(parameter.shape)
        if form == EIGHT_BITS:
            device += 2 * (numbers + 4 * numbers / block if block else 4 * numbers)
        elif form == OFFLOAD:
            host += 2 * numbers * parameter.element_size()
        else:
            device += 2 * numbers * parameter.element_size()
    return device, host


def update_bytes(form: str, parameters: Iterable[nn.Parameter], world: int) -> float:
    """Most bytes that the update has on a rank's device beside parameters, gradients and moments.

    Args:
        parameters: whole ones, of which each of ``world`` ranks updates its share.
    """
    if form == FULL:
        return 0.0
    most = 0.0
    for parameter in parameters:
        row = parameter.numel() // max(1, parameter.shape[0]) if parameter.ndim else 1
        chunk = min(max(row, CHUNK), parameter.numel() / world)
        each = _WORK_8BIT if form == EIGHT_BITS else 2 * SLOTS * parameter.element_size()
        most = max(most, each * chunk)
    return most
