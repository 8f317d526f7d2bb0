"""What sparse attention did: density, recall and balance of each call, measured on demand."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex, Window
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


class Observer(AbstractContextManager["Observer"]):
    """Collects one :class:`AttentionStats` per attention call made inside it, in order.

    Costs host synchronisation and collectives (for recall, and for the rows of block patterns, which every rank then
    holds whole): enter it on logging steps, on all ranks alike.

    Args:
        recall_rows: rows sampled at random for recall; 0 leaves it out.
        seed: of the sampled rows.
    """

    def __init__(self, recall_rows: int = 0, seed: int = 0) -> None:
        self.recall_rows, self.seed = recall_rows, seed
        self.stats: list[AttentionStats] = []

    def __enter__(self) -> Observer:
        _observers.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _observers.remove(self)


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
        work = tile_work(index, plan.layout, plan.ring.world)
        by_head: list[float] = []
        if observer.recall_rows:
            chosen = torch.Generator().manual_seed(observer.seed + len(observer.stats))
            rows = torch.randint(shard.length, (observer.recall_rows,), generator=chosen).to(q.device)
            by_head = measure_recall(q, k, lse, rows, shard, scale).double().mean((0, 2)).tolist()
        observer.stats.append(
            AttentionStats(
                density=real.density().mean().item(),
                columns=real.column_counts.double().mean().item(),
                recall_by_head=by_head,
                balance=imbalance(work, plan.ring.outer),
                tile_work=work,
                index=index,
                window=window,
            )
        )


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
