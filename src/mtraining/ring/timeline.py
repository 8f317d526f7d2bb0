"""Where the time of ring attention goes: computing, and waiting for transfers that computing did not hide."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import TracebackType
from typing import Literal, ParamSpec, TypeVar, get_args

import torch

Phase = Literal["forward", "backward"]
PHASES: tuple[Phase, ...] = get_args(Phase)
P = ParamSpec("P")
T = TypeVar("T")

_timelines: list[Timeline] = []
_passes: list[_Pass] = []  # the one under way, if any


@dataclass(frozen=True)
class RingTimes:
    """One pass of one attention call over the ring, in seconds by ring step.

    Attributes:
        phase: forward (a layer's recompute runs it again) or backward.
        compute: all but ``exposed``. What brings gradients home counts to backward's last step.
        exposed: waits for transfers that were still under way when their result was needed.
        sent: bytes that this rank sent to others, keys and gradients; columns, which are summed over all ranks, are
            left out.
    """

    phase: Phase
    compute: list[float]
    exposed: list[float]
    sent: int = 0


class Timeline(AbstractContextManager["Timeline"]):
    """Collects one :class:`RingTimes` for each pass over the ring made inside it, forward and backward, in order.

    On a GPU two events stand around each wait on the compute stream, which a wait holds up for as long as the transfer
    is exposed; nothing waits for the device until the timeline is left, which does once. Elsewhere the clock is read.
    Estimation, before the ring turns, is not part of it. Free when no timeline is in force.
    """

    def __init__(self) -> None:
        self.passes: list[RingTimes] = []
        self._finished: list[_Pass] = []

    def __enter__(self) -> Timeline:
        _timelines.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _timelines.remove(self)
        for device in {done.device for done in self._finished if done.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        self.passes += [done.times() for done in self._finished]
        self._finished.clear()

    @property
    def compute(self) -> float:
        """Seconds of all passes but for exposed waits."""
        return sum(sum(times.compute) for times in self.passes)

    @property
    def exposed(self) -> float:
        """Seconds of all passes spent waiting for transfers."""
        return sum(sum(times.exposed) for times in self.passes)

    @property
    def exposed_fraction(self) -> float:
        """Exposed waits over all time of the passes; 0 without any pass."""
        total = self.compute + self.exposed
        return self.exposed / total if total else 0.0

    def by_step(self, phase: Phase) -> tuple[list[float], list[float]]:
        """(compute, exposed) seconds of each ring step, summed over the passes of this phase."""
        chosen = [times for times in self.passes if times.phase == phase]
        steps = max((len(times.compute) for times in chosen), default=0)
        compute, exposed = [0.0] * steps, [0.0] * steps
        for times in chosen:
            for step, (computing, waiting) in enumerate(zip(times.compute, times.exposed, strict=True)):
                compute[step] += computing
                exposed[step] += waiting
        return compute, exposed


@dataclass
class _Pass:
    """Moments of one pass: each begins a stretch of one ring step's computing or waiting."""

    phase: Phase
    device: torch.device
    step: int = -1
    sent: int = 0
    moments: list[tuple[int, bool, float | torch.cuda.Event]] = field(default_factory=list)

    def mark(self, waiting: bool = False) -> None:
        now: float | torch.cuda.Event = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self.device))
        self.moments.append((max(self.step, 0), waiting, now))

    def times(self) -> RingTimes:
        steps = self.moments[-1][0] + 1
        compute, exposed = [0.0] * steps, [0.0] * steps
        for (step, waiting, begin), (_, _, end) in zip(self.moments[:-1], self.moments[1:], strict=True):
            (exposed if waiting else compute)[step] += _seconds(begin, end)
        return RingTimes(self.phase, compute, exposed, self.sent)


def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return begin.elapsed_time(end) / 1000


def timed_pass(phase: Phase) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Time a function that turns the ring once; one of its arguments, the first, is a tensor on the device."""

    def decorate(turn: Callable[P, T]) -> Callable[P, T]:
        @wraps(turn)
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            if not _timelines:
                return turn(*args, **kwargs)
            assert isinstance(args[0], torch.Tensor)
            under_way = _Pass(phase, args[0].device)
            _passes.append(under_way)
            try:
                under_way.mark()
                result = turn(*args, **kwargs)
                under_way.mark()
            finally:
                _passes.remove(under_way)
            for timeline in _timelines:
                timeline._finished.append(under_way)
            return result

        return timed

    return decorate


def begin_step() -> None:
    """What follows belongs to the next ring step; to the first one, so does what came before."""
    for under_way in _passes:
        under_way.step += 1
        under_way.mark()


def count_sent(size: int) -> None:
    """Note a message of so many bytes to another rank."""
    for under_way in _passes:
        under_way.sent += size


@contextmanager
def waiting() -> Iterator[None]:
    """Around a wait for a transfer."""
    for under_way in _passes:
        under_way.mark(waiting=True)
    yield
    for under_way in _passes:
        under_way.mark()
