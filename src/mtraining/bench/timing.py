"""Medians of repeated runs, with warm-up, and the memory they took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20  # several times any L2
_PAUSE_CYCLES = 20_000_000  # about ten milliseconds
_MOST_UNTIMED = 500  # calls, so that the queue of launches does not fill where each is short


@dataclass(frozen=True)
class Timing:
    """Median milliseconds, and peak MiB allocated on the GPU meanwhile (None on a CPU)."""

    ms: float
    peak_mib: float | None


def measure(run: Callable[[], object], device: torch.device, seconds: float = 0.5) -> Timing:
    """Time ``run``: warm-up, then 3 to 50 repetitions in about ``seconds``, each after the L2 cache is overwritten.

    The repetitions are queued together behind a pause, so that the time is the GPU's, as in a training step whose host
    runs ahead, and not that of launching kernels onto an idle GPU. Before them ``run`` repeats for ``seconds`` without
    being timed: a GPU that comes from idling runs short work at clocks that its power limit does not let it keep in
    training, and long work at those it can keep, so lengths and kernels would not compare.
    """
    if device.type != "cuda":
        run()
        return Timing(statistics.median(_wall_ms(run) for _ in range(3)), None)
    run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    estimate = _events_ms(run, flush, 1)[0]
    fit = max(3, int(1000 * seconds / max(estimate, 1e-3)))
    times = _events_ms(run, flush, min(50, fit), untimed=min(_MOST_UNTIMED, fit))
    return Timing(statistics.median(times), peak)


def _events_ms(run: Callable[[], object], flush: torch.Tensor, times: int, untimed: int = 0) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    torch.cuda._sleep(_PAUSE_CYCLES)
    for _ in range(untimed):
        run()
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
