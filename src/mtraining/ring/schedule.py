"""The one schedule of the ring, flat or hierarchical, forward and backward.

While the inner ring turns over the keys of one node, the keys of the next node travel the outer (slow) link
once, in the background: an inter-node transfer has ``inner`` compute steps to hide behind instead of one
(METHOD.md section 4). A flat ring is the case of one outer round.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mtraining.ring.timeline import begin_step
from mtraining.ring.topology import Hop, Ring


def ring_steps(own: Tensor, ring: Ring) -> Iterator[tuple[int, Tensor]]:
    """Yield (source rank, its payload) for every rank of the ring, this one first.

    The next transfer is already in flight when a payload is yielded; whatever the caller computes hides it. The payload
    must not be written to.
    """
    for outer_step in range(ring.outer):
        outer_hop = ring.outer_hop(own) if outer_step + 1 < ring.outer else None
        payload = own
        for inner_step in range(ring.inner):
            inner_hop = ring.inner_hop(payload) if inner_step + 1 < ring.inner else None
            begin_step(outer_step * ring.inner + inner_step)
            yield ring.source(outer_step, inner_step), payload
            if inner_hop is not None:
                payload = inner_hop.wait()
        if outer_hop is not None:
            own = outer_hop.wait()


class GradientRing:
    """Carries the gradients of travelling keys round each node, adding each rank's share, and every round's sum home.

    Call :meth:`add` once a step, in the order of :func:`ring_steps`, with this rank's share for that step's source;
    :meth:`finish` returns the full gradient of this rank's own keys. Within a round a sum follows its keys, one hop
    a step, each under the next step's computing. From the last step it goes straight to its owner, across nodes under
    the whole next round. The very last message has no step to hide under: compute something else before :meth:`finish`.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._inner_step = self._outer_step = 0
        self._hop: Hop | None = None  # this round's sum so far, from the rank before
        self._home_hop: Hop | None = None  # the sum of the round before, from the rank where it ended
        self._total: Tensor | None = None

    def add(self, share: Tensor) -> None:
        """Add this rank's share for the step's source; ``share`` is consumed."""
        if self._hop is not None:
            share += self._hop.wait()
            self._hop = None
        self._inner_step += 1
        if self._inner_step < self._ring.inner:
            self._hop = self._ring.inner_hop(share)
            return
        self._collect()
        if self._ring.inner > 1 or self._outer_step:
            self._home_hop = self._ring.home_hop(share, self._outer_step)
        else:
            self._total = share  # a node of one rank: the keys were its own
        self._inner_step, self._outer_step = 0, self._outer_step + 1

    def finish(self) -> Tensor:
        """The summed gradient of this rank's own payload."""
        self._collect()
        assert self._total is not None, "no round was finished"
        return self._total

    def _collect(self) -> None:
        """Add the sum that the round before sent home."""
        if self._home_hop is not None:
            arrived, self._home_hop = self._home_hop.wait(), None
            self._total = arrived if self._total is None else self._total.add_(arrived)
