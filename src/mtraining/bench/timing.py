"""Medians of repeated runs, with warm-up, and the memory they took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20  # several times any L2
_MOST_TIMED = 10  # calls
_AT_ONCE = 0.05  # seconds of untimed work between two looks at the clock
_CYCLES_PER_SECOND = 2e9  # of a GPU's clock, at most
_MOST_QUEUEING = 0.02  # seconds a call; what takes longer waits for the GPU itself


@dataclass(frozen=True)
class Timing:
    """Median milliseconds; peak MiB allocated on the GPU meanwhile, and the mean clock of its multiprocessors in MHz
    (None on a CPU; the clock also where nothing tells it: it takes the package nvidia-ml-py)."""

    ms: float
    peak_mib: float | None
    sm_mhz: float | None = None


def measure(
    run: Callable[[], object], device: torch.device, seconds: float = 0.5, warm_up: float = 0.5
) -> Timing:
    """Time ``run``: 3 to 10 repetitions in about ``seconds``, each after the L2 cache is overwritten.

    The repetitions are queued together behind a pause twice as long as queueing them takes. So the time is the GPU's,
    as in a training step whose host runs ahead, and not that of launching kernels onto an idle GPU.

    Before them ``run`` repeats for ``warm_up`` seconds without being timed. A GPU that comes from idling runs for some
    tenths of a second at clocks that its power limit does not let it keep in training. Short and long work would then
    not compare. Two seconds are enough on an H200.
    """
    if device.type != "cuda":
        run()
        return Timing(statistics.median(_wall_ms(run) for _ in range(3)), None)
    run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    run()
    queueing = min(time.perf_counter() - begin, _MOST_QUEUEING)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    (estimate,), _ = _events_ms(run, flush, 1, 2 * queueing)
    a_second = 1000 / max(estimate, 1e-3)  # calls
    _keep_busy(run, max(1, int(a_second * _AT_ONCE)), warm_up)
    timed = min(_MOST_TIMED, max(3, int(a_second * seconds)))
    times, clocks = _events_ms(run, flush, timed, 2 * timed * queueing)
    return Timing(statistics.median(times), peak, statistics.mean(clocks) if clocks else None)


def wait(device: torch.device) -> None:
    """Until a GPU has done all it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _keep_busy(run: Callable[[], object], calls: int, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()


def _events_ms(
    run: Callable[[], object], flush: torch.Tensor, times: int, pause: float
) -> tuple[list[float], list[int]]:
    """Milliseconds of each call, and clocks read until the last one was done."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    torch.cuda._sleep(int(pause * _CYCLES_PER_SECOND))
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    clocks = []
    while not events[-1][1].query():
        clocks += _clock(flush.device)
        time.sleep(0.001)
    return [start.elapsed_time(end) for start, end in events], clocks


def _clock(device: torch.device) -> list[int]:
    try:
        return [torch.cuda.clock_rate(device)]
    except Exception:  # no package to ask, or a driver that does not tell: the time stands without
        return []


def _wall_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)
