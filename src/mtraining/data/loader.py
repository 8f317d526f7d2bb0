"""Batches in an order that depends on nothing but the seed and the step number.

Sample n of a run (n = step * global_batch + i) is a window that the dataset names (`SequenceDataset.sample`). So any
split over dp ranks, and a resume at any step, sees the same global batches, and there is no loader state to save.

Each dp rank takes a consecutive part of every global batch. Where sequences differ in attention work, as packed ones
do, the batch is dealt so that ranks which wait for one another compute alike (:func:`deal`).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data._utils import signal_handling

from mtraining.data.dataset import SequenceDataset
from mtraining.errors import UserError

_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_END_SECONDS = 5.0  # in which the end of a killed process is known


@dataclass(frozen=True)
class StepPlan:
    """What the dp ranks read in one step.

    Attributes:
        windows: of each rank, in its order.
        imbalance: time that ranks take together over the time of an even share, where every micro-batch waits for its
            slowest rank; attention work alone. 1 is even, None where all sequences are alike or one rank reads all.
    """

    windows: list[list[int]]
    imbalance: float | None


def deal(work: np.ndarray, ranks: int, micro_batch: int) -> list[list[int]]:
    """The places of a global batch that each rank takes, in the order of its micro-batches.

    Ranks meet after every micro-batch, so it is micro-batches that must be even. Sequences of similar work share one:
    they are sorted, and each run of ranks x micro_batch is dealt out, the heaviest first to the rank with least.

    Args:
        work: float64 (global batch,).
    """
    heaviest = np.argsort(-work, kind="stable")
    parts: list[list[int]] = [[] for _ in range(ranks)]
    total = np.zeros(ranks)
    for first in range(0, len(work), ranks * micro_batch):
        load = np.zeros(ranks)
        for row in range(first, first + ranks * micro_batch, ranks):
            # Equal within this micro-batch: to the rank with least so far.
            for rank, place in zip(np.lexsort((total, load)), heaviest[row : row + ranks], strict=True):
                parts[rank].append(int(place))
                load[rank] += work[place]
        total += load
    return parts


def imbalance(work: np.ndarray, parts: list[list[int]], micro_batch: int) -> float:
    """See `StepPlan.imbalance`."""
    loads = np.array([work[part] for part in parts]).reshape(len(parts), -1, micro_batch).sum(2)
    return float(loads.max(0).sum() / loads.mean(0).sum())


class StepSampler(Sampler[list[int]]):
    """Micro-batches of window numbers of one dp rank, from `start_step` on; see :func:`build_loader`."""

    def __init__(
        self,
        dataset: SequenceDataset,
        *,
        global_batch: int,
        dp_rank: int,
        dp_size: int,
        micro_batch: int | None,
        start_step: int = 0,
        steps: int | None = None,
    ) -> None:
        if global_batch < 1 or global_batch % dp_size:
            raise UserError(
                f"global_batch {global_batch} cannot be divided over {dp_size} data-parallel ranks; "
                f"the nearest that can is {max(1, round(global_batch / dp_size)) * dp_size}"
            )
        if not 0 <= dp_rank < dp_size:
            raise UserError(f"dp_rank is {dp_rank}; it must lie in 0..{dp_size - 1}")
        self.per_rank = global_batch // dp_size
        self.micro = self.per_rank if micro_batch is None else micro_batch
        if self.micro < 1 or self.per_rank % self.micro:
            raise UserError(
                f"micro_batch {self.micro} does not divide the {self.per_rank} sequences that each data-parallel rank "
                f"has of global_batch {global_batch}; use a divisor of {self.per_rank}"
            )
        self.dataset, self.global_batch, self.dp_rank = dataset, global_batch, dp_rank
        self.start_step, self.steps = start_step, steps

    def plan(self, step: int) -> StepPlan:
        """Every rank's windows of one step."""
        first = step * self.global_batch
        batch = [self.dataset.sample(n) for n in range(first, first + self.global_batch)]
        ranks = self.global_batch // self.per_rank
        work = self.dataset.work(batch) if ranks > 1 else None
        if work is None:
            return StepPlan([batch[i : i + self.per_rank] for i in range(0, len(batch), self.per_rank)], None)
        parts = deal(work, ranks, self.micro)
        windows = [[batch[place] for place in part] for part in parts]
        return StepPlan(windows, imbalance(work, parts, self.micro))

    def windows(self, step: int) -> list[int]:
        """This rank's windows of one step, in order."""
        return self.plan(step).windows[self.dp_rank]

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while self.steps is None or step < self.steps:
            windows = self.windows(step)
            for first in range(0, self.per_rank, self.micro):
                yield windows[first : first + self.micro]
            step += 1


def build_loader(
    dataset: SequenceDataset,
    *,
    global_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    micro_batch: int | None = None,
    start_step: int = 0,
    steps: int | None = None,
    num_workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> DataLoader[dict[str, torch.Tensor]]:
    """A DataLoader of dicts of int64 (micro_batch, S_local), to be iterated once.

    global_batch: sequences of one optimizer step over all dp ranks.
    micro_batch: sequences in one yielded batch; each step yields global_batch / dp_size / micro_batch of them.
    start_step, steps: the first step, and the step before which to end (None: never; epochs wrap, each in a new order).
    num_workers, prefetch: reading processes, and the batches each holds ready.

    Raises:
        UserError: batch sizes that do not divide.
    """
    sampler = StepSampler(
        dataset,
        global_batch=global_batch,
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch=micro_batch,
        start_step=start_step,
        steps=steps,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        # a fork would copy the running communication and device threads' locks
        multiprocessing_context="spawn" if num_workers else None,
        worker_init_fn=_apart,
        pin_memory=pin_memory,
    )


def _apart(worker: int) -> None:
    """Tie a reading process to the process that it reads for, and to nothing else.

    Signals to the run's process group pass it by: the run still needs it to reach its end, and ends it then.
    """
    os.setpgid(0, 0)
    end_with_parent()


def end_with_parent() -> None:
    """Let this process be killed when the one that started it ends, at once where it has ended already.

    Without it a reading process waits for ever when the run died while it was still importing: PyTorch checks only that
    its parent does not change from then on. Such an orphan also keeps the command's output open.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


class ReaderDied(RuntimeError):
    """A process that reads data has died; the text says which and how, as the end of a sentence."""


def read(loader: DataLoader[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of a loader. Its processes start now.

    PyTorch's signal handler, which raises an error wherever the main thread happens to be, is taken away again: amid a
    checkpoint that error would be mistaken for a failed save. A dead process is found when its batch is waited for.

    Raises:
        ReaderDied: while iterating, some seconds after a reading process has died.
    """
    others = multiprocessing.active_children()
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    readers = [process for process in multiprocessing.active_children() if process not in others]
    if readers and threading.current_thread() is threading.main_thread():
        earlier_loader = getattr(handler, "__module__", None) == signal_handling.__name__
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if earlier_loader else handler)
    return _told(batches, readers)


def _told(
    batches: Iterator[dict[str, torch.Tensor]], readers: list[multiprocessing.process.BaseProcess]
) -> Iterator[dict[str, torch.Tensor]]:
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        if readers and not isinstance(error, RuntimeError):
            # A process killed while it hands a batch over breaks the connection, before its end is known.
            ended = wait([reader.sentinel for reader in readers], timeout=_END_SECONDS)
            for reader in readers:
                if reader.sentinel in ended:
                    reader.join()
        dead = next((reader for reader in readers if reader.exitcode), None)
        if dead is None or dead.exitcode is None:
            raise
        how = f"(process {dead.pid}) ended with exit code {dead.exitcode}"
        if dead.exitcode < 0:
            how = f"(process {dead.pid}) was killed by {signal.Signals(-dead.exitcode).name}"
        if dead.exitcode == -signal.SIGKILL:
            how += ", as the system does when memory runs out (fewer data.workers need less)"
        raise ReaderDied(how) from None


def step_plan(
    dataset: SequenceDataset,
    step: int,
    *,
    global_batch: int,
    dp_size: int = 1,
    micro_batch: int | None = None,
) -> StepPlan:
    """What the dp ranks read at a step, for metrics and for messages that name the batch."""
    sampler = StepSampler(
        dataset, global_batch=global_batch, dp_rank=0, dp_size=dp_size, micro_batch=micro_batch
    )
    return sampler.plan(step)
