"""Layer recompute replays the index of the first pass: a second estimate would make forward and backward disagree."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from mtraining.kernel import SparseIndex


@dataclass
class Recorded:
    """One attention call of the first pass; ``out`` and ``lse`` only when the tape keeps outputs."""

    index: SparseIndex
    out: Tensor | None = None
    lse: Tensor | None = None


class Tape:
    """What one pass through a layer made, kept to be handed back, in order, when the layer is run again.

    Use ``record()`` around the first run and ``replay()`` around each later one (``torch.utils.checkpoint``
    takes the pair as its ``context_fn``).
    """

    _local: threading.local
    """Of each kind of tape: the one in force. Recompute runs in autograd's thread, the first pass in the caller's."""

    def __init__(self) -> None:
        self.replaying = False
        self._made: list[Any] = []
        self._next = 0

    @contextmanager
    def record(self) -> Iterator[None]:
        self._made.clear()
        with self._active(replaying=False):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        self._next = 0
        with self._active(replaying=True):
            yield

    @contextmanager
    def _active(self, replaying: bool) -> Iterator[None]:
        before, self.replaying = self.current(), replaying
        self._local.tape = self
        try:
            yield
        finally:
            self._local.tape = before

    @classmethod
    def current(cls) -> Self | None:
        """The tape of this kind that surrounds what this thread runs, if any."""
        return getattr(cls._local, "tape", None)


class IndexTape(Tape):
    """Records the attention calls made in one forward region.

    Of each call it keeps :meth:`SparseIndex.nbytes`. For a vertical-slash pattern this is a byte a block and four a
    column for each head: 20 KiB a head at 512K tokens and 4096 columns. For block lists it is a bit for each pair of a
    local query block and a block: 64 KiB a head at 512K tokens over 32 ranks, 256 KiB over 8.

    Args:
        keep_outputs: keep (out, lse) too, so that a replay runs neither the ring nor the estimation.
    """

    _local = threading.local()

    def __init__(self, keep_outputs: bool = False) -> None:
        super().__init__()
        self.keep_outputs = keep_outputs

    def write(self, call: Recorded) -> None:
        self._made.append(call)

    def read(self) -> Recorded:
        if self._next >= len(self._made):
            raise RuntimeError(
                "recompute made more attention calls than the first pass: the layer is not deterministic"
            )
        self._next += 1
        call: Recorded = self._made[self._next - 1]
        return call


def current_tape() -> IndexTape | None:
    """The tape that surrounds this thread's attention calls, if any."""
    return IndexTape.current()
