"""The one schedule of the ring, flat or hierarchical, forward and backward.

While the inner ring turns over the keys of one node, the keys of the next node travel the outer (slow) link
once, in the background: an inter-node transfer has ``inner`` compute steps to hide behind instead of one
(METHOD.md section 4). A flat ring is the case of one outer round.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

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
            yield ring.source(outer_step, inner_step), payload
            if inner_hop is not None:
                payload = inner_hop.wait()
        if outer_hop is not None:
            own = outer_hop.wait()


class GradientRing:
    """Carries the gradients of travelling keys after them, adding each rank's share, and at last brings them home.

    Call :meth:`add` once a step, in the order of :func:`ring_steps`, with this rank's share for that step's source;
    :meth:`finish` returns the full gradient of this rank's own keys. Every wait comes one compute step
    after its transfer began, but for the last hop home.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._inner_step = self._outer_step = 0
        self._inner_hop: Hop | None = None
        self._round: Hop | Tensor | None = None  # a finished round's sum, perhaps on its last inner hop
        self._outer_hop: Hop | None = None

    def add(self, share: Tensor) -> None:
        """Add this rank's share for the step's source; ``share`` is consumed."""
        if self._inner_step == 0 and self._round is not None:
            self._outer_hop = self._ring.outer_hop(self._round_total())
            self._outer_step += 1
        elif self._inner_hop is not None:
            share += self._inner_hop.wait()
        self._inner_step += 1
        self._inner_hop = self._ring.inner_hop(share) if self._ring.inner > 1 else None
        if self._inner_step == self._ring.inner:
            self._round = self._inner_hop or share
            self._inner_step, self._inner_hop = 0, None

    def finish(self) -> Tensor:
        """The summed gradient of this rank's own payload."""
        total = self._round_total()
        if self._ring.outer > 1:  # each round moved it one rank on
            total = self._ring.outer_hop(total, by=-self._outer_step).wait()
        return total

    def _round_total(self) -> Tensor:
        """The round just finished, with what earlier nodes summed for the same keys."""
        assert self._round is not None, "no step was added"
        total = self._round.wait() if isinstance(self._round, Hop) else self._round
        if self._outer_hop is not None:
            total += self._outer_hop.wait()
        return total
