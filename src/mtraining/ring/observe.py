"""What sparse attention did: density, recall and balance of each call, measured on demand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex, Window, joined_where_alike
from mtraining.pattern import SequenceShard
from mtraining.pattern.probe import gather_queries, global_lse, sequence_scope
from mtraining.ring.balance import Imbalance, imbalance, tile_work
from mtraining.ring.plan import RingPlan

_observers: list[Observer] = []


@dataclass(frozen=True)
class AttentionStats:
    """One attention call, over all heads and the whole sequence.

    Attributes:
        density: as `SparseIndex.density` has it, of the blocks that hold a real token; mean over heads.
        columns: mean columns a head.
        recall_by_head: share of the true attention mass that each head's index keeps, mean over the batch and sampled
            rows; empty when not sampled.
        balance: imbalance in the layout and ring in use.
        tile_work: float64 (ranks, sources), slash tiles, in the layout in use.
        index: the index itself, whole on every rank, e.g. to ask how another layout would balance it.
        window: of the call. A model's layer that has one attends to all of it, whatever the pattern of others.
    """

    density: float
    columns: float
    recall_by_head: list[float]
    balance: Imbalance
    tile_work: Tensor
    index: SparseIndex
    window: Window | None = None

    @property
    def recall(self) -> float | None:
        """Mean of ``recall_by_head``; None when not sampled."""
        return sum(self.recall_by_head) / len(self.recall_by_head) if self.recall_by_head else None


@dataclass
class _Seen:
    """One call, before the host has read anything of it.

    Attributes:
        real: the part of the index that holds real tokens.
        recall: float64 (q_heads,), or None.
    """

    index: SparseIndex
    real: SparseIndex
    plan: RingPlan
    recall: Tensor | None
    window: Window | None


class Observer(AbstractContextManager["Observer"]):
    """Collects one :class:`AttentionStats` per attention call made inside it, in order.

    The host reads nothing of a call before ``stats`` is asked for, so it may run ahead of the device. Recall, and rows
    of block patterns, which every rank then holds whole, cost collectives: enter it on all ranks alike.

    Args:
        recall_rows: rows sampled at random for recall; 0 leaves it out.
        seed: of the sampled rows.
    """

    def __init__(self, recall_rows: int = 0, seed: int = 0) -> None:
        self.recall_rows, self.seed = recall_rows, seed
        self._seen: list[_Seen] = []
        self._stats: list[AttentionStats] = []

    def __enter__(self) -> Observer:
        _observers.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _observers.remove(self)

    @property
    def calls(self) -> int:
        """How many calls were made."""
        return len(self._stats) + len(self._seen)

    @property
    def stats(self) -> list[AttentionStats]:
        """What was seen. Waits for the device."""
        seen, self._seen = self._seen, []
        self._stats += _stats(seen)
        return self._stats


def _stats(seen: Sequence[_Seen]) -> list[AttentionStats]:
    """Few kernels for all calls together, and few waits."""
    shares: dict[int, tuple[float, float]] = {}
    for places, index in joined_where_alike({place: one.real for place, one in enumerate(seen)}):
        both = torch.stack([index.density(), index.column_counts.double()])
        means = both.unflatten(2, (len(places), -1)).mean((1, 3)).T.tolist()
        shares |= {place: (density, columns) for place, (density, columns) in zip(places, means, strict=True)}
    found = []
    for place, one in enumerate(seen):
        work = tile_work(one.index, one.plan.layout, one.plan.ring.world)
        found.append(
            AttentionStats(
                density=shares[place][0],
                columns=shares[place][1],
                recall_by_head=[] if one.recall is None else one.recall.tolist(),
                balance=imbalance(work, one.plan.ring.outer),
                tile_work=work,
                index=one.index,
                window=one.window,
            )
        )
    return found


@torch.no_grad()
def observe(
    q: Tensor, k: Tensor, lse: Tensor, index: SparseIndex, plan: RingPlan, shard: SequenceShard, scale: float,
    window: Window | None = None,
) -> None:  # fmt: skip
    """Report one finished call to the observers in force (free when there are none)."""
    if _observers:
        index = index.whole(plan.ring)
        real = index.upto(shard.covered(index.block_size))
    for observer in _observers:
        recall = None
        if observer.recall_rows:
            chosen = torch.Generator().manual_seed(observer.seed + observer.calls)
            rows = torch.randint(shard.length, (observer.recall_rows,), generator=chosen)
            rows = rows.to(q.device, non_blocking=True)
            recall = measure_recall(q, k, lse, rows, shard, scale).double().mean((0, 2))
        observer._seen.append(_Seen(index, real, plan, recall, window))


def chosen(stats: Sequence[AttentionStats]) -> list[AttentionStats]:
    """Those of layers whose pattern chose: a window keeps all of itself, which says nothing of the pattern."""
    return [one for one in stats if one.window is None]


def measure_recall(
    q: Tensor, k: Tensor, lse: Tensor, rows: Tensor, shard: SequenceShard, scale: float
) -> Tensor:
    """Share of each row's true softmax mass that the index kept: exp(sparse lse - dense lse).

    The true softmax is over the keys that causality and the shard's starts leave to the row.

    Args:
        q, k, lse: this rank's queries, keys and the finished sparse lse (batch, q_heads, local tokens).
        rows: int64 (n,), global positions, the same on every rank.

    Returns:
        (batch, q_heads, n), the same on every rank.
    """
    at, scope = sequence_scope(rows, q.shape[0], shard, 1)
    dense = shard.backend.probe_lse(gather_queries(q, rows, shard), k, at, shard.positions, scale, scope)
    slots = shard.slots[rows]
    held = slots >= 0
    sparse = shard.comm.all_sum(
        torch.where(held, lse[..., slots.clamp(min=0)], torch.zeros_like(lse[..., :1]))
    )
    return (sparse - global_lse(dense, shard)).exp()
