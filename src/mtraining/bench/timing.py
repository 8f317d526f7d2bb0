"""Medians of repeated runs, with warm-up, and the memory they took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20  # several times any L2


@dataclass(frozen=True)
class Timing:
    """Median milliseconds, and peak MiB allocated on the GPU meanwhile (None on a CPU)."""

    ms: float
    peak_mib: float | None


def measure(run: Callable[[], object], device: torch.device, seconds: float = 0.5) -> Timing:
    """Time ``run``: warm-up, then 3 to 50 repetitions in about ``seconds``, each after the L2 cache is overwritten."""
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
    estimate = _event_ms(run, flush)
    times = [_event_ms(run, flush) for _ in range(max(3, min(50, int(1000 * seconds / max(estimate, 1e-3)))))]
    return Timing(statistics.median(times), peak)


def _event_ms(run: Callable[[], object], flush: torch.Tensor) -> float:
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _wall_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)
