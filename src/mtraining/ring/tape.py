"""Layer recompute replays the index of the first pass: a second estimate would make forward and backward disagree."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from mtraining.kernel import SparseIndex

_local = threading.local()  # recompute runs in autograd's thread, the first pass in the caller's


@dataclass
class Recorded:
    """One attention call of the first pass; ``out`` and ``lse`` only when the tape keeps outputs."""

    index: SparseIndex
    out: Tensor | None = None
    lse: Tensor | None = None


class IndexTape:
    """Records the attention calls made in one forward region and hands them back, in order, when the region
    is run again.

    Use ``record()`` around the first run and ``replay()`` around each later one (``torch.utils.checkpoint``
    takes the pair as its ``context_fn``).

    Of each call it keeps :meth:`SparseIndex.nbytes`. For a vertical-slash pattern this is a byte a block and four a
    column for each head: 20 KiB a head at 512K tokens and 4096 columns. For block lists it is a bit for each pair of a
    local query block and a block: 64 KiB a head at 512K tokens over 32 ranks, 256 KiB over 8.

    Args:
        keep_outputs: keep (out, lse) too, so that a replay runs neither the ring nor the estimation.
    """

    def __init__(self, keep_outputs: bool = False) -> None:
        self.keep_outputs = keep_outputs
        self.replaying = False
        self._calls: list[Recorded] = []
        self._next = 0

    @contextmanager
    def record(self) -> Iterator[None]:
        self._calls.clear()
        with self._active(replaying=False):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        self._next = 0
        with self._active(replaying=True):
            yield

    @contextmanager
    def _active(self, replaying: bool) -> Iterator[None]:
        before, self.replaying = current_tape(), replaying
        _local.tape = self
        try:
            yield
        finally:
            _local.tape = before

    def write(self, call: Recorded) -> None:
        self._calls.append(call)

    def read(self) -> Recorded:
        if self._next >= len(self._calls):
            raise RuntimeError(
                "recompute made more attention calls than the first pass: the layer is not deterministic"
            )
        self._next += 1
        return self._calls[self._next - 1]


def current_tape() -> IndexTape | None:
    """The tape that surrounds this thread's attention calls, if any."""
    return getattr(_local, "tape", None)
