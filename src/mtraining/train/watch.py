"""Every rank of a run notices within seconds that another one died or failed, and says which.

A launcher does this for its own machine. What it cannot do is end the ranks of other machines, or name the rank whose
silence they see as a broken connection, or (NCCL between GPUs that share memory) as a wait without end. So a thread of
each rank says through the launcher's store that the rank lives, and looks for its neighbour.

A rank that lives and hangs, in reading data say, looks to the others like a wait without end as well. So ranks also say
where in the program they are, and rank 0 tells it when nothing moves, long before the wait is given up.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mtraining.errors import UserError
from mtraining.train.store import CheckpointStore

PACKAGE = Path(__file__).parents[1]
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 15.0  # a rank is dead that has not been heard for so long
SUSPECT_SECONDS = 4.0  # ... or for so long when a connection has just broken
GRACE_SECONDS = (
    4.0  # between the verdict and the end of the others: a launcher is to meet the true cause first
)


class PeerLost(Exception):
    """Why a rank ended that did nothing wrong; for its launcher, which is not to blame it."""


_numbers = itertools.count()  # a process may run more than once, as all ranks do


@contextmanager
def watched(run: Path, rank: int, world: int, stall_seconds: float) -> Iterator[None]:
    """End this process when another rank of the run dies or fails, and tell the others when this one fails.

    Does nothing for processes that no launcher started. Leaving is collective: ranks that are done wait for the others.

    Args:
        stall_seconds: when rank 0 has not moved for so long, it warns and says where each rank is.
    """
    if world == 1 or "RANK" not in os.environ:
        yield
        return
    watch = _Watch(run, rank, world, stall_seconds)
    try:
        yield
    except Exception as error:
        watch.fail(error)
        raise
    watch.leave()


def way_on(run: Path) -> str:
    """How to go on after a run has ended early."""
    latest = CheckpointStore(run).latest()
    if latest is None:
        return "there is no checkpoint yet."
    return f"the last good checkpoint is {latest}: run the same command again to go on from it."


def reason(error: str) -> str:
    """The first line of an error's text; a wait that was given up gets its option and its likely cause."""
    line = error.strip().partition("\n")[0]
    if "timed out waiting" in line.lower():
        line += "; another rank hangs, or needs longer than distributed.timeout_seconds"
    return line


def launcher_store() -> dist.TCPStore:
    """A connection of its own to the store of the launcher, or of rank 0, to be used by one thread.

    Raises:
        KeyError, ValueError: no launcher has said where it is.
        RuntimeError: it is not there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank = int(os.environ["RANK"])
    return dist.TCPStore(host, port, is_master=not agent and rank == 0 and not dist.is_initialized())


class _Watch:
    def __init__(self, run: Path, rank: int, world: int, stall_seconds: float) -> None:
        self._run, self._rank, self._world, self._stall_seconds = run, rank, world, stall_seconds
        self._watched = threading.get_ident()
        self._prefix = f"mtraining/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_numbers)}"
        self._store = launcher_store()  # the main thread's
        self._suspicious = threading.Event()
        self._leaving = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def fail(self, error: Exception) -> None:
        """Tell the others; but where this rank may only have met another's end, the thread finds out first."""
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            self._suspicious.set()
            time.sleep(
                SUSPECT_SECONDS + GRACE_SECONDS + 5 * BEAT_SECONDS
            )  # the thread ends the process meanwhile
        self._leaving.set()
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # where the store is gone, the others see it by themselves
            self._verdict(self._store, self._rank, f"failed ({reason(what)})")

    def leave(self) -> None:
        """Wait for all; from here on a store that has gone away is no failure."""
        with contextlib.suppress(RuntimeError):
            self._store.add(f"{self._prefix}/done", 1)
            while self._store.add(f"{self._prefix}/done", 0) < self._world:
                time.sleep(BEAT_SECONDS / 20)
        self._leaving.set()

    def _look(self) -> None:
        store, beat = launcher_store(), 0
        neighbour = (self._rank + 1) % self._world
        heard: dict[int, tuple[str, float]] = {}
        here, since = "", time.monotonic()
        try:
            while not self._leaving.wait(BEAT_SECONDS):
                beat += 1
                moved, here = here, whereabouts(self._watched)
                if moved != here:
                    since = time.monotonic()
                store.set(f"{self._prefix}/beat/{self._rank}", f"{beat} {here}")
                if self._rank == 0 and time.monotonic() - since > self._stall_seconds:
                    self._tell_stalled(store)
                    since = math.inf  # once, until it moves
                suspicious = self._suspicious.is_set()
                for other in range(self._world) if suspicious else (neighbour,):
                    told, now = self._beat(store, other), time.monotonic()
                    if heard.get(other, ("", 0.0))[0] != told or other not in heard:
                        heard[other] = told, now
                    limit = SUSPECT_SECONDS if suspicious else SILENCE_SECONDS
                    if other != self._rank and now - heard[other][1] > limit:
                        self._verdict(
                            store, other, "stopped answering: it was killed, or its machine is gone"
                        )
                if store.check([f"{self._prefix}/verdict"]):
                    return self._end(store.get(f"{self._prefix}/verdict").decode())
        except RuntimeError:  # the store's connection broke
            if not self._leaving.wait(GRACE_SECONDS):
                self._end("rank 0 or its launcher, which keeps the ranks in touch, stopped answering")

    def _beat(self, store: dist.TCPStore, rank: int) -> str:
        """What a rank said last, "" where it has said nothing yet."""
        key = f"{self._prefix}/beat/{rank}"
        return store.get(key).decode() if store.check([key]) else ""

    def _tell_stalled(self, store: dist.TCPStore) -> None:
        places: dict[str, list[int]] = {}
        for rank in range(self._world):
            places.setdefault(self._beat(store, rank).partition(" ")[2] or "a place not told yet", []).append(
                rank
            )
        fewest = sorted(places.items(), key=lambda item: len(item[1]))  # the others may be waiting for these
        print(
            f"warning: rank 0 has not moved for {self._stall_seconds:.0f} s; "
            + "; ".join(f"{_named(ranks)} in {place}" for place, ranks in fewest)
            + ". A collective that waits longer than distributed.timeout_seconds ends the run.",
            file=sys.stderr,
            flush=True,
        )

    def _verdict(self, store: dist.TCPStore, rank: int, what: str) -> None:
        """The first one holds."""
        store.compare_set(f"{self._prefix}/verdict", "", f"rank {rank} {what}")

    def _end(self, verdict: str) -> None:
        if self._leaving.wait(GRACE_SECONDS):
            return
        get_error_handler().record_exception(PeerLost(verdict))
        if self._suspicious.is_set() or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {verdict}, so rank {self._rank} ends too; {way_on(self._run)}", file=sys.stderr)
        exit_now(1)


def whereabouts(thread: int) -> str:
    """The innermost place in this package, "train/step.py:91 (run)", at which a thread of this process is."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "code of others"


def _named(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs = [list(run) for _, run in itertools.groupby(enumerate(ranks), key=lambda item: item[1] - item[0])]
    spans = [str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs]
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(spans)


def exit_now(code: int) -> NoReturn:
    """Leave at once: a normal exit would wait for background threads that wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
