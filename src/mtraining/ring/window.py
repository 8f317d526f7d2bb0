"""The ring under a sliding window: each rank is sent the keys that its queries can reach, and no others.

A window is known on the host, so every rank knows which of its blocks another one needs. Keys do not travel round then.
They go from their owner straight to each rank that needs them, cut to the blocks in reach, and their gradients come
straight back. What nobody needs is not sent, and steps in which nobody needs anything do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtraining.kernel import Placement
from mtraining.kernel.placement import progression
from mtraining.kernel.reference.attention import accumulation_dtype
from mtraining.ring.timeline import begin_step
from mtraining.ring.topology import Exchange, Ring


@dataclass(frozen=True, eq=False)
class WindowStep:
    """One step of the route: every rank sends to the rank ``offset`` further on, where there is anything to send.

    Attributes:
        offset: of this rank's source and of its target.
        sent: int64 (n,), local rows of this rank's keys that the target needs; None for none.
        placement: this rank's queries against what it receives; None where that is nothing.
    """

    offset: int
    sent: Tensor | None
    placement: Placement | None


@dataclass(frozen=True, eq=False)
class WindowRoute:
    """All steps of a window after the first one, which is that of a rank's own keys.

    Attributes:
        steps: those in which any rank needs anything, the same ones on every rank.
        block_size: tokens of a block.
    """

    steps: tuple[WindowStep, ...]
    block_size: int


class WindowVisit(NamedTuple):
    """Keys that are there: the step that brought them, None for a rank's own, and what they are.

    ``kv`` is None in a step in which this rank receives nothing. ``last``: no keys come after these.
    """

    step: WindowStep | None
    kv: Sequence[Tensor] | Tensor | None
    last: bool


def needed_blocks(blocks: Tensor, block_size: int, window: int) -> Tensor:
    """Which blocks each rank can reach: bool (world ranks, world sources, local blocks of the source).

    Args:
        blocks: int64 (world, local blocks), global numbers of every rank's blocks.
    """
    queries, keys = blocks[:, None, :, None], blocks[None, :, None, :]
    first = (queries * block_size - (window - 1)).clamp(min=0) // block_size
    return ((keys <= queries) & (keys >= first)).any(2)


def make_route(
    ring: Ring, blocks: Tensor, block_size: int, window: int, q_blocks: Tensor
) -> WindowRoute | None:
    """The route of a window over the ring; None where keys had better travel round.

    They had where that sends no more, as where every rank needs all keys of every other one; and in a ring of rings
    where more would cross to other nodes than once round.

    Args:
        blocks: int64 (world, local blocks), global numbers of every rank's blocks, on the CPU.
        q_blocks: this rank's, on its device.
    """
    world, rank, device = ring.world, ring.rank, q_blocks.device
    needed = needed_blocks(blocks, block_size, window)
    needed[range(world), range(world)] = False
    pairs, count = needed.sum(2), blocks.shape[1]
    # Ranks are numbered across nodes first.
    node = torch.arange(world) % ring.outer
    abroad = torch.where(node[:, None] != node[None, :], pairs, 0).sum(0).max()
    if pairs.sum() >= world * (world - 1) * count or (ring.outer > 1 and abroad > (ring.outer - 1) * count):
        return None
    steps = []
    for offset in range(1, world):
        target, source = (rank + offset) % world, (rank - offset) % world
        if not any(int(pairs[(r + offset) % world, r]) for r in range(world)):
            continue
        out, into = (needed[a, b].nonzero().flatten() for a, b in ((target, rank), (rank, source)))
        placement = None
        if into.numel():
            theirs = blocks[source, into]
            placement = Placement(
                q_blocks, theirs.to(device), blocks.numel(), progression(blocks[rank], theirs)
            )
        rows = (out[:, None] * block_size + torch.arange(block_size)).flatten().to(device)
        steps.append(WindowStep(offset, rows if out.numel() else None, placement))
    return WindowRoute(tuple(steps), block_size)


def window_steps(own: Sequence[Tensor], ring: Ring, route: WindowRoute) -> Iterator[WindowVisit]:
    """Yield this rank's own keys and then, step after step of the route, those it receives.

    The next transfer is in flight when keys are yielded, as in :func:`mtraining.ring.schedule.ring_steps`, and the same
    holds here for who keeps them.
    """
    k, v = own
    left = sum(step.placement is not None for step in route.steps)

    def begin(step: WindowStep) -> Exchange:
        sent = None if step.sent is None else torch.stack((k[:, step.sent], v[:, step.sent]))
        shape = None
        if step.placement is not None:
            tokens = step.placement.k_blocks.numel() * route.block_size
            shape = torch.Size((2, k.shape[0], tokens, *k.shape[2:]))
        return ring.exchange(sent, step.offset, shape, k.dtype, k.device)

    under_way = begin(route.steps[0]) if route.steps else None
    begin_step()
    yield WindowVisit(None, own, left == 0)
    for number, step in enumerate(route.steps):
        assert under_way is not None
        arrived = under_way.wait()
        under_way = begin(route.steps[number + 1]) if number + 1 < len(route.steps) else None
        left -= step.placement is not None
        begin_step()
        yield WindowVisit(step, arrived, left == 0)
        # Its memory is for the keys to come.
        del arrived


class WindowGradients:
    """Carries the gradients of keys that were sent back to their owners, step after step of the route."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._under_way: list[tuple[Exchange, WindowStep]] = []
        self._total: Tensor | None = None

    def add(self, share: Tensor | None, step: WindowStep | None) -> None:
        """Add this rank's share for the step's keys, None where it received none; the share is consumed.

        Call it once for each of :func:`window_steps`. Sums are made and sent in the accumulation dtype.
        """
        wide = None if share is None else share.to(accumulation_dtype(share.dtype))
        if step is None:
            self._total = wide
            return
        assert self._total is not None, "a rank's own keys come first"
        shape = None
        if step.sent is not None:
            shape = torch.Size((*self._total.shape[:2], step.sent.numel(), *self._total.shape[3:]))
        # What came by this offset goes back by it.
        back = self._ring.exchange(wide, -step.offset, shape, self._total.dtype, self._total.device)
        self._under_way.append((back, step))
        self._collect(but=2)

    def finish(self) -> Tensor:
        """The summed gradient of this rank's own keys."""
        self._collect(but=0)
        assert self._total is not None, "no step was made"
        return self._total

    def _collect(self, but: int) -> None:
        while len(self._under_way) > but:
            back, step = self._under_way.pop(0)
            arrived = back.wait()
            if arrived is not None and self._total is not None:
                # Each row occurs once, so the order of additions is that of the steps.
                self._total.index_add_(2, step.sent, arrived)  # type: ignore[arg-type]
