"""Medians of repeated runs, with warm-up, and the memory they took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20  # several times any L2
_MOST_TIMED, _MOST_UNTIMED = 10, 500  # calls
_CYCLES_PER_SECOND = 2e9  # of a GPU's clock, at most
_MOST_QUEUEING = 0.02  # seconds a call; what takes longer waits for the GPU itself


@dataclass(frozen=True)
class Timing:
    """Median milliseconds, and peak MiB allocated on the GPU meanwhile (None on a CPU)."""

    ms: float
    peak_mib: float | None


def measure(run: Callable[[], object], device: torch.device, seconds: float = 0.5) -> Timing:
    """Time ``run``: warm-up, then 3 to 10 repetitions in about ``seconds``, each after the L2 cache is overwritten.

    The repetitions are queued together behind a pause twice as long as queueing them takes, so that the time is the
    GPU's, as in a training step whose host runs ahead, and not that of launching kernels onto an idle GPU. Before them
    ``run`` repeats for ``seconds`` without being timed: a GPU that comes from idling runs short work at clocks that its
    power limit does not let it keep in training, and long work at those it can keep, so lengths and kernels would not
    compare.
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
    estimate = _events_ms(run, flush, 1, pause=2 * queueing)[0]
    fit = max(3, int(1000 * seconds / max(estimate, 1e-3)))
    timed = min(_MOST_TIMED, fit)
    times = _events_ms(run, flush, timed, pause=2 * timed * queueing, untimed=min(_MOST_UNTIMED, fit))
    return Timing(statistics.median(times), peak)


def _events_ms(
    run: Callable[[], object], flush: torch.Tensor, times: int, pause: float, untimed: int = 0
) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for _ in range(untimed):
        run()
    torch.cuda._sleep(int(pause * _CYCLES_PER_SECOND))
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _wall_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)
