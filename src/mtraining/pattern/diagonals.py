"""From token distances to the block diagonals that execute them."""

from __future__ import annotations

import torch
from torch import Tensor


def distances_to_diagonals(distances: Tensor, seq_len: int, block_size: int) -> Tensor:
    """Token distances -> the block diagonals that contain them.

    Distance 128 a + b crosses block diagonal a, and a + 1 as well when b > 0 (METHOD.md section 2).

    Args:
        distances: int64 (rows, n), padded with values >= seq_len.

    Returns:
        bool (rows, seq_len // block_size).
    """
    num_blocks = seq_len // block_size
    lower = distances // block_size
    upper = lower + (distances % block_size > 0)
    bits = torch.zeros(distances.shape[0], num_blocks + 1, dtype=torch.bool, device=distances.device)
    for block in (lower, upper):
        bits.scatter_(1, torch.where(distances < seq_len, block, num_blocks).clamp(max=num_blocks), True)
    return bits[:, :num_blocks].contiguous()
