"""Scores of columns and slashes under a few probe queries, estimated over all ranks without gathering keys.

Every rank scores its own keys. The sums travel to the rank that owns the head (an all-to-all). So selection is spread
over ranks by head, and no rank waits for a serial step on another.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtraining.kernel import ProbeScope
from mtraining.pattern.base import SequenceShard
from mtraining.pattern.documents import DiagonalSlots, Documents

PLACEMENTS = ("last", "spread", "mixed")
# 2^32 over the golden ratio: multiples of it fill an interval evenly, whatever their number.
_GOLDEN = 0x9E3779B9


def probe_positions(count: int, placement: str, seq_len: int, device: torch.device) -> Tensor:
    """Where the probe's queries stand: int64 (min(count, seq_len),), ascending, without a host synchronisation.

    ``seq_len`` counts real tokens only: a probe in the padding would choose what no real query looks for.

    ``last``: the last ``count`` tokens (the paper). ``spread``: one in each of ``count`` equal parts of the sequence,
    at a place of its part that moves from part to part by the golden ratio. A fixed place would put every query of
    a long sequence at the same place of its block and, in a striped layout, on one rank. ``mixed``: the last
    half of them at the end, the first half spread over what comes before.
    """
    count = min(count, seq_len)
    rank = torch.arange(count, device=device)
    return _place(rank, torch.full_like(rank, count), torch.full_like(rank, seq_len), placement)


def document_probe(count: int, placement: str, documents: Documents) -> Tensor:
    """Where the probe's queries stand in packed documents: int64 (batch, min(count, real tokens)), ascending.

    Documents share the queries by their tokens, since each token weighs the same in the loss. Within its document each
    share stands as :func:`probe_positions` has it: ``last`` are the last queries of every document. Documents that are
    too short for a query of their own (:func:`probed`) have none, and the others share theirs.

    The queries of a document depend on the lengths of all and on what no other holds. -1 stands for a query that is
    left over, where there are fewer tokens to probe than queries.
    """
    count, device = min(count, documents.length), documents.first.device
    long = probed(documents, count)
    upto = long.long().cumsum(1)  # tokens of long documents up to and with each
    total = upto[:, -1:]
    rank = torch.arange(count, device=device)
    # The last token of each of ``count`` equal parts says whose query it is.
    wanted = -(-(rank + 1) * total // count)
    token = torch.searchsorted(upto, wanted).clamp(max=documents.seq_len - 1)
    first, size = documents.first.gather(1, token), documents.sizes.gather(1, token)
    begin = upto.gather(1, first) - 1
    before, past = begin * count // total.clamp(min=1), (begin + size) * count // total.clamp(min=1)
    own = torch.minimum(past - before, size)
    within = rank - before
    places = first + _place(within, own, size, placement)
    return torch.where((within < own) & (total > 0), places, -1)


def probed(documents: Documents, count: int) -> Tensor:
    """bool (batch, seq_len): the token's document has at least one of ``count`` probe queries.

    Documents of less than 1 / count of the sequence have none. They are computed whole: together they cost at most
    1 / count of the sequence's full attention.
    """
    return documents.sizes * min(count, documents.length) >= documents.length


def _place(rank: Tensor, count: Tensor, size: Tensor, placement: str) -> Tensor:
    """Place of query ``rank`` of ``count`` in a run of ``size`` tokens; int64, of one shape."""
    spread = {"last": torch.zeros_like(count), "spread": count, "mixed": count // 2}[placement]
    before = size - (count - spread)
    parts = spread.clamp(min=1)
    start, end = rank * before // parts, (rank + 1) * before // parts
    inside = ((rank + 1) * _GOLDEN % 2**32 * (end - start)) >> 32
    return torch.where(rank < spread, start + inside, before + rank - spread)


def probe_scope(positions: Tensor, documents: Documents, block_size: int) -> ProbeScope:
    """What probe queries at ``positions`` int64 (batch, probe) may see, and where their slashes go.

    Places are those of tokens for distances: a document's first token is its distance 0. For block diagonals they are
    those of :class:`mtraining.pattern.documents.DiagonalSlots`. A query that is left over sees nothing.
    """
    there, at = positions >= 0, positions.clamp(min=0)
    if block_size == 1:
        base, reach, slots = documents.first, documents.sizes, documents.seq_len
    else:
        places = DiagonalSlots.of(documents, block_size)
        base, reach, slots = places.base, places.reach, places.first.shape[1]
    base, reach, starts = (x.gather(1, at) for x in (base, reach, documents.starts))
    return ProbeScope(torch.where(there, starts, documents.seq_len), base, reach, slots)


def sequence_scope(
    positions: Tensor, batch: int, shard: SequenceShard, block_size: int
) -> tuple[Tensor, ProbeScope | None]:
    """Queries at ``positions`` int64 (n,), and what starts leave them to see, in places of the whole sequence.

    Returns:
        with starts positions (batch, n) and a scope; else positions as they are and None.
    """
    if shard.starts is None:
        return positions, None
    positions = positions.expand(batch, -1)
    slots, starts = shard.seq_len // block_size, shard.starts.long().gather(1, positions)
    none = torch.zeros_like(starts)
    return positions, ProbeScope(starts, none, none + slots, slots)


def gather_queries(q: Tensor, positions: Tensor, shard: SequenceShard) -> Tensor:
    """Queries at global ``positions`` on every rank: (batch, probe, q_heads, head_dim).

    Each query has one owner; the others add zeros, so the sum is exact in any dtype.

    Args:
        positions: int64 (probe,), or (batch, probe) where each batch row has its own; nothing stands at -1.
    """
    slots = torch.where(positions >= 0, shard.slots[positions.clamp(min=0)], -1)
    held, where = (slots >= 0)[..., None, None], slots.clamp(min=0)
    if positions.ndim == 1:
        found = q[:, where]
    else:
        found = q[torch.arange(q.shape[0], device=q.device)[:, None], where]
    return shard.comm.all_sum(torch.where(held, found, torch.zeros((), dtype=q.dtype, device=q.device)))


def global_lse(local: Tensor, shard: SequenceShard) -> Tensor:
    """Log-sum-exp over every rank's keys from each rank's own, any shape."""
    return shard.comm.all_gather(local).logsumexp(0)


def column_and_slash_mass(
    q: Tensor, k: Tensor, positions: Tensor, shard: SequenceShard, scale: float, block_size: int = 1,
    probe: Tensor | None = None, scope: ProbeScope | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Probability of each key (verticals) and of each slash under the probe, for the rows owned here.

    Rows are the flattened (batch, q_heads), padded to a multiple of the world and given to ranks in order. Every rank
    scores all probe queries against its own keys, so no rank waits for the one that holds a query.

    Masses are plain sums of probabilities. An early query has fewer keys to share its mass, but also fewer to compute,
    and each query weighs one: a sum over queries spread evenly estimates the share of *all* attention that a column or
    a slash holds, which is the recall that a budget buys. Dividing by how many queries can reach a key would instead
    favour keys near the end that few queries read.

    Args:
        positions: int64 (probe,), global positions of the probe queries; with a scope (batch, probe).
        block_size: slashes are block diagonals of so many tokens, so many times fewer; 1: token distances.
        probe: the queries at ``positions``, where the caller has gathered them (:func:`gather_queries`).
        scope: what each query may see (:func:`probe_scope`); None: all that comes before.

    Returns:
        verticals (owned rows, seq_len) and slashes (owned rows, seq_len // block_size, or the scope's slots), fp32
        (fp64 for fp64 inputs).
        Each row sums to the probe's size, except for what falls beyond the last block diagonal.
    """
    world, seq_len, backend = shard.comm.world, shard.seq_len, shard.backend
    if probe is None:
        probe = gather_queries(q, positions, shard)
    lse = global_lse(backend.probe_lse(probe, k, positions, shard.positions, scale, scope), shard)
    columns, slashes = backend.probe_mass(
        probe, k, positions, shard.positions, scale, lse, seq_len, block_size, scope
    )
    owned, width = -(-columns.shape[0] // world), columns.shape[1]
    both = pad(torch.cat([columns, slashes], 1), (0, 0, 0, owned * world - columns.shape[0]))
    both = shard.comm.all_to_all(both.unflatten(0, (world, owned)))
    columns, slashes = both[..., :width], both[..., width:]
    verticals = columns.new_empty(owned, seq_len)
    verticals[:, shard.all_positions.flatten()] = columns.transpose(0, 1).flatten(1)
    return verticals, slashes.sum(0)


def owned_rows(owned: Tensor, batch: int, q_heads: int, shard: SequenceShard) -> Tensor:
    """Which of the flattened (batch, q_heads) each owned row (rows, ...) is: int64 (rows,).

    Rows are dealt in order. The last rank's last ones may stand for nothing; they are given the number of the last.
    """
    number = torch.arange(len(owned), device=owned.device) + shard.comm.rank * len(owned)
    return number.clamp(max=batch * q_heads - 1)


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
