"""Scores of columns and slashes under a few probe queries, estimated over all ranks without gathering keys.

Every rank scores its own keys; the sums travel to the rank that owns the head (an all-to-all), so that
selection work is spread over ranks by head and no rank waits for a serial step on another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtraining.pattern.base import SequenceShard

PLACEMENTS = ("last", "spread", "mixed")
_GOLDEN = (
    0x9E3779B9  # 2^32 over the golden ratio: multiples of it fill an interval evenly, whatever their number
)


def probe_positions(count: int, placement: str, seq_len: int, device: torch.device) -> Tensor:
    """Where the probe's queries stand: int64 (min(count, seq_len),), ascending, without a host synchronisation.

    ``seq_len`` counts real tokens only: a probe in the padding would choose what no real query looks for.

    ``last``: the last ``count`` tokens (the paper). ``spread``: one in each of ``count`` equal parts of the sequence,
    at a place of its part that moves from part to part by the golden ratio. A fixed place would put every query of
    a long sequence at the same place of its block and, in a striped layout, on one rank. ``mixed``: the last
    half of them at the end, the first half spread over what comes before.
    """
    count = min(count, seq_len)
    spread = {"last": 0, "spread": count, "mixed": count // 2}[placement]
    before = seq_len - (count - spread)
    part = torch.arange(spread + 1, device=device)
    start = part * before // max(spread, 1)
    inside = (part[1:] * _GOLDEN % 2**32 * start.diff()) >> 32
    return torch.cat([start[:-1] + inside, torch.arange(before, seq_len, device=device)])


def gather_queries(q: Tensor, positions: Tensor, shard: SequenceShard) -> Tensor:
    """Queries at global ``positions`` on every rank: (batch, len(positions), q_heads, head_dim).

    Each query has one owner; the others add zeros, so the sum is exact in any dtype.
    """
    slots = shard.slots[positions]
    held = (slots >= 0)[:, None, None]
    return shard.comm.all_sum(
        torch.where(held, q[:, slots.clamp(min=0)], torch.zeros((), dtype=q.dtype, device=q.device))
    )


def global_lse(local: Tensor, shard: SequenceShard) -> Tensor:
    """Log-sum-exp over every rank's keys from each rank's own, any shape."""
    return shard.comm.all_gather(local).logsumexp(0)


def column_and_slash_mass(
    q: Tensor, k: Tensor, positions: Tensor, shard: SequenceShard, scale: float, block_size: int = 1,
    probe: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Probability of each key (verticals) and of each slash under the probe, for the rows owned here.

    Rows are the flattened (batch, q_heads), padded to a multiple of the world and dealt to ranks in order. Every rank
    scores all probe queries against its own keys, so no rank waits for the one that holds a query.

    Masses are plain sums of probabilities. An early query has fewer keys to share its mass, but also fewer to compute,
    and each query weighs one: a sum over queries spread evenly estimates the share of *all* attention that a column or
    a slash holds, which is the recall that a budget buys. Dividing by how many queries can reach a key would instead
    favour keys near the end that few queries read.

    Args:
        positions: int64 (probe,), global positions of the probe queries.
        block_size: slashes are block diagonals of so many tokens, so many times fewer; 1: token distances.
        probe: the queries at ``positions``, where the caller has gathered them (:func:`gather_queries`).

    Returns:
        verticals (owned rows, seq_len), slashes (owned rows, seq_len // block_size), fp32 (fp64 for fp64 inputs), each
        row summing to the probe's size, but for what falls beyond the last block diagonal.
    """
    world, seq_len, backend = shard.comm.world, shard.seq_len, shard.backend
    if probe is None:
        probe = gather_queries(q, positions, shard)
    lse = global_lse(backend.probe_lse(probe, k, positions, shard.positions, scale), shard)
    columns, slashes = backend.probe_mass(
        probe, k, positions, shard.positions, scale, lse, seq_len, block_size
    )
    owned, width = -(-columns.shape[0] // world), columns.shape[1]
    both = pad(torch.cat([columns, slashes], 1), (0, 0, 0, owned * world - columns.shape[0]))
    both = shard.comm.all_to_all(both.unflatten(0, (world, owned)))
    columns, slashes = both[..., :width], both[..., width:]
    verticals = columns.new_empty(owned, seq_len)
    verticals[:, shard.all_positions.flatten()] = columns.transpose(0, 1).flatten(1)
    return verticals, slashes.sum(0)


def share_rows(owned: Tensor, batch: int, q_heads: int, shard: SequenceShard) -> Tensor:
    """Owned rows (rows, n) of every rank -> (batch, q_heads, n) on every rank, the padding rows dropped."""
    return shard.comm.all_gather(owned).flatten(0, 1)[: batch * q_heads].unflatten(0, (batch, q_heads))


def share_choice(
    columns: Tensor, diagonals: Tensor, batch: int, q_heads: int, shard: SequenceShard
) -> tuple[Tensor, Tensor]:
    """What was chosen for the owned rows, on every rank: one message.

    Args:
        columns: integers (rows, capacity).
        diagonals: bool (rows, blocks).

    Returns:
        int32 (batch, q_heads, capacity) and bool (batch, q_heads, blocks), both contiguous.
    """
    capacity, blocks = columns.shape[1], diagonals.shape[1]
    flags = diagonals.new_zeros(diagonals.shape[0], blocks + -blocks % 4, dtype=torch.uint8)
    flags[:, :blocks] = diagonals
    chosen = torch.cat([columns.to(torch.int32), flags.view(torch.int32)], 1)
    both = share_rows(chosen, batch, q_heads, shard)
    flags = both[..., capacity:].contiguous().view(torch.uint8)[..., :blocks]
    return both[..., :capacity].contiguous(), flags.bool().contiguous()
