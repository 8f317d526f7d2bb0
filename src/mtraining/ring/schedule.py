"""The one schedule of the ring, flat or hierarchical, forward and backward.

While the inner ring turns over the keys of one node, the keys of the next node travel the outer (slow) link once, in
the background. A transfer between nodes has ``inner`` compute steps to hide behind instead of one (docs/how/rings.md;
arXiv 2510.18830, hierarchical sparse ring attention). A flat ring is the case of one outer round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import NamedTuple

import torch
from torch import Tensor

from mtraining.kernel.reference.attention import accumulation_dtype
from mtraining.ring.links import head_start
from mtraining.ring.timeline import begin_step
from mtraining.ring.topology import Hop, Ring


class Step(NamedTuple):
    """One step of a rank: its place in the pass, which turn of which ring it is, and whose keys are there."""

    number: int
    outer: int
    inner: int
    source: int


def ring_steps(
    own: Sequence[Tensor], ring: Ring, own_node_last: bool = False
) -> Iterator[tuple[Step, Sequence[Tensor] | Tensor]]:
    """Yield (step, payload of its source) for every rank of the ring, this one first.

    A payload is ``own`` of its source: tensors of one shape and dtype, packed into one message.

    The next transfer is already in flight when a payload is yielded; whatever the caller computes hides it. The payload
    must not be written to, and not be kept. Where the caller lets go of each before it asks for the next, a flat ring
    holds two payloads at a time: the one at work and the one that arrives. A ring of rings holds two more, which travel
    between nodes, and with ``own_node_last`` the two at which its own node's turn stopped.

    Args:
        own_node_last: keep half of this node's steps for the end. Backward asks for that: gradients of other nodes'
            keys return to their owners under these steps, and the first transfer between nodes has the other half to
            hide behind.
    """
    # There is nobody to send to, so nothing is packed.
    if ring.world == 1:
        begin_step()
        yield Step(0, 0, 0, ring.rank), own
        return
    payload = torch.stack(tuple(own))
    del own
    numbers = count()
    first = (ring.inner + 1) // 2
    own_node = _round(payload, ring, 0, numbers)
    # A slice leaves the payload it stopped at in the generator: only where the rest comes later.
    begun = islice(own_node, first) if own_node_last else own_node
    for outer_step in range(ring.outer):
        outer_hop = ring.outer_hop(payload) if outer_step + 1 < ring.outer else None
        turn = begun if outer_step == 0 else _round(payload, ring, outer_step, numbers)
        if outer_hop is None:
            del payload  # the turn has it, for as long as it needs it
        yield from turn
        if outer_hop is not None:
            payload = outer_hop.wait()
    yield from own_node


def _round(
    payload: Tensor, ring: Ring, outer_step: int, numbers: Iterator[int]
) -> Iterator[tuple[Step, Tensor]]:
    """One turn of the inner ring."""
    for inner_step in range(ring.inner):
        inner_hop = ring.inner_hop(payload) if inner_step + 1 < ring.inner else None
        begin_step()
        yield Step(next(numbers), outer_step, inner_step, ring.source(outer_step, inner_step)), payload
        if inner_hop is not None:
            payload = inner_hop.wait()
            del inner_hop  # which holds what was sent: memory for the next one to arrive in


class GradientRing:
    """Carries the gradients of travelling keys: round each node, where every rank adds its share, then to their owner.

    Call :meth:`add` once for each of :func:`ring_steps`, with this rank's share for that step's source. :meth:`finish`
    returns the full gradient of this rank's own keys. Within a round a sum follows its keys, one hop a step, each under
    the next step's computing. After the round's last step it goes straight to its owner; across nodes that transfer has
    a whole round to hide under. The very last message, within the node, has no step to hide under: compute something
    else before :meth:`finish`.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        # Of each round under way, its sum so far, from the rank before.
        self._hops: dict[int, Hop] = {}
        # Sums of finished rounds, on their way to this rank, which owns the keys.
        self._home_hops: list[Hop] = []
        self._total: Tensor | None = None

    def add(self, share: Tensor | None, step: Step) -> None:
        """Add this rank's share for the step's source, which every step has; ``share`` is consumed.

        Sums are made and sent in the accumulation dtype, whatever the share's.
        """
        assert share is not None
        if step.outer in self._hops:
            share = self._hops.pop(step.outer).wait().add_(share)
        elif self._ring.world > 1:
            share = share.to(accumulation_dtype(share.dtype))
        if step.inner + 1 < self._ring.inner:
            self._hops[step.outer] = self._ring.inner_hop(share)
        elif self._ring.inner > 1 or step.outer:
            self._home_hops.append(self._ring.home_hop(share, step.outer))
            head_start(share.device)
            self._collect(but=2)  # each holds two sums in memory
        else:
            self._total = share  # a node of one rank: the keys were its own

    def finish(self) -> Tensor:
        """The summed gradient of this rank's own payload."""
        self._collect(but=0)
        assert self._total is not None, "no round was finished"
        return self._total

    def _collect(self, but: int) -> None:
        """Add the sums that came home, ``but`` for the latest few."""
        while len(self._home_hops) > but:
            arrived = self._home_hops.pop(0).wait()
            self._total = arrived if self._total is None else self._total.add_(arrived)
