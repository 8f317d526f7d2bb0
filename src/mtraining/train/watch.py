"""Every rank of a run notices within seconds that another one died or failed, and says which.

A launcher does this for its own machine. It cannot end the ranks of other machines, nor name the rank whose death they
see as a broken connection, or (NCCL between GPUs that share memory) as a wait without end. So each rank has a thread
that publishes signs of life in the launcher's store and watches the next rank.

Slow is not dead: a rank may be stopped, swapped out, compiling or waiting for a disk. What tells that a process is gone
stands in peers.py. Silence alone ends a run only after `distributed.silence_seconds`.

A rank that lives and hangs, in reading data say, looks to the others like a wait without end as well. So ranks also
publish where in the program they are. Rank 0 prints it when nothing moves, long before the wait is given up.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mtraining.errors import RunStopped, UserError
from mtraining.train.leaving import exit_now
from mtraining.train.peers import RETRY_SECONDS, Door, Identity, Line, OsProcess, refused
from mtraining.train.store import CheckpointStore

PACKAGE = Path(__file__).parents[1]
BEAT_SECONDS = 1.0
# Once a collective has failed the run is over: a rank that is silent for so long is named as the likely cause.
SUSPECT_SECONDS = 4.0
# Between the verdict and the end of the others: a launcher is to meet the true cause first.
GRACE_SECONDS = 4.0
# One wait for the launcher's store. Longer ones are made of several.
STORE_SECONDS = 30.0


class PeerLost(Exception):
    """Why a rank ended that did nothing wrong; for its launcher, which is not to blame it."""


_numbers = itertools.count()  # a process may run more than once, as all ranks do


@contextmanager
def watched(
    run: Path, rank: int, world: int, *, stall_seconds: float, silence_seconds: float
) -> Iterator[None]:
    """End this process when another rank of the run dies or fails, and tell the others when this one fails.

    Does nothing for processes that no launcher started. Leaving is collective: ranks that are done wait for the others.

    Args:
        stall_seconds: when rank 0 has not moved for so long, it warns and says where each rank is.
        silence_seconds: a rank that has given no sign of life for so long counts as dead.
    """
    if world == 1 or "RANK" not in os.environ:
        yield
        return
    watch = _Watch(run, rank, world, stall_seconds, silence_seconds)
    try:
        yield
    except BaseException as error:  # what a failed checkpoint raises is no Exception
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


def failed_collective(error: BaseException) -> bool:
    """Whether an error may come from another rank's end, be it one of several that a checkpoint met.

    gloo raises plain RuntimeErrors, which name a file and line of its own: "[.../gloo/transport/tcp/pair.cc:538]".
    """
    failures = getattr(error, "failures", None)
    causes = [error, *(failures.values() if isinstance(failures, dict) else ())]
    causes = [cause[0] if isinstance(cause, tuple) else cause for cause in causes]
    return any(
        isinstance(cause, dist.DistError)
        or (isinstance(cause, RuntimeError) and re.search(r"\[[^\]\s]*gloo[^\]\s]*:\d+\]", str(cause)))
        for cause in causes
    )


def launcher_store(seconds: float = STORE_SECONDS) -> dist.TCPStore:
    """A connection of its own to the store of the launcher, or of rank 0, to be used by one thread.

    Args:
        seconds: how long to try to connect, and the longest wait for an answer where the store bounds it.

    Raises:
        KeyError, ValueError: no launcher has said where it is.
        RuntimeError: it is not there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    rank = int(os.environ["RANK"])
    return dist.TCPStore(
        host,
        port,
        is_master=not agent and rank == 0 and not dist.is_initialized(),
        timeout=timedelta(seconds=seconds),
    )


class _Watch:
    def __init__(
        self, run: Path, rank: int, world: int, stall_seconds: float, silence_seconds: float
    ) -> None:
        self._run, self._rank, self._world = run, rank, world
        self._stall_seconds, self._silence_seconds = stall_seconds, silence_seconds
        self._neighbour = (rank + 1) % world
        self._watched = threading.get_ident()
        self._prefix = f"mtraining/watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_numbers)}"
        self._store = launcher_store(silence_seconds)  # the main thread's
        self._door = Door()
        self._machine = self._door.identity.machine
        self._identities: dict[int, Identity] = {}
        self._line: Line | None = None
        self._started = time.monotonic()
        self._line_told = False
        self._suspicious = threading.Event()
        self._leaving = threading.Event()
        self._rounds = 0  # completed by `_look`, counted by `_guard`
        for name, target in (("watch", self._look), ("watch-guard", self._guard)):
            threading.Thread(target=target, name=name, daemon=True).start()

    def fail(self, error: BaseException) -> None:
        """Tell the others; but where this rank may only have met another's end, the thread finds out first."""
        if failed_collective(error):
            self._suspicious.set()
            # The thread ends the process meanwhile.
            time.sleep(SUSPECT_SECONDS + GRACE_SECONDS + 5 * BEAT_SECONDS)
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if isinstance(error, RunStopped):  # without the way on, which every rank tells
            what = str(error).partition("; ")[0]
        with contextlib.suppress(RuntimeError):  # where the store is gone, the others see it by themselves
            self._verdict(self._store, self._rank, f"failed ({reason(what)})")
        self._leaving.set()

    def leave(self) -> None:
        """Wait for all; from here on a store that has gone away is no failure."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{self._prefix}/done/{self._rank}", "")
            self._store.add(f"{self._prefix}/done", 1)
            while self._store.add(f"{self._prefix}/done", 0) < self._world:
                time.sleep(BEAT_SECONDS / 20)
        self._leaving.set()

    def _look(self) -> None:
        """The watching thread: one round a beat. A round that fails is repeated with a new connection to the store."""
        try:
            self._look_on()
        finally:
            self._door.close()
            if self._line is not None:
                self._line.close()

    def _look_on(self) -> None:
        rounds: Iterator[str | None] | None = None
        while not self._leaving.wait(BEAT_SECONDS):
            try:
                rounds = rounds or self._watching()
                verdict = next(rounds)
            except Exception as error:  # of the store, mostly: it is slow, or gone
                rounds = None
                if self._leaving.is_set():
                    return
                verdict = self._store_lost(error)
            else:
                self._rounds += 1
            if verdict is not None:
                return self._end(verdict)

    def _watching(self) -> Iterator[str | None]:
        """Each item is one round's verdict on the run, or None while nobody has failed."""
        store = launcher_store()
        store.set(f"{self._prefix}/who/{self._rank}", json.dumps(asdict(self._door.identity)))
        quiet = _Quiet()
        here, since = "", time.monotonic()
        for beat in itertools.count():
            moved, here = here, whereabouts(self._watched)
            if moved != here:
                since = time.monotonic()
            store.set(f"{self._prefix}/beat/{self._rank}", f"{time.monotonic_ns()} {here}")
            if self._rank == 0 and time.monotonic() - since > self._stall_seconds:
                self._tell_stalled(store)
                since = math.inf  # once, until it moves
            suspicious = self._suspicious.is_set()
            for other in range(self._world) if suspicious else (self._neighbour,):
                if other == self._rank:
                    continue
                silence = quiet.seconds(other, self._beat(store, other), beat)
                what = self._gone(store, other)
                if what is None and silence > self._silence_seconds:
                    what = (
                        f"gave no sign of life for {silence:.0f} s (distributed.silence_seconds): "
                        "it is stopped, or its machine is gone"
                    )
                if what is None and suspicious and silence > SUSPECT_SECONDS:
                    what = f"has given no sign of life for {silence:.0f} s, and a collective has failed"
                if what is not None and not store.check([f"{self._prefix}/done/{other}"]):
                    self._verdict(store, other, what)
            verdict = f"{self._prefix}/verdict"
            yield store.get(verdict).decode() if store.check([verdict]) else None

    def _gone(self, store: dist.TCPStore, other: int) -> str | None:
        """How it is known that a rank's process has ended, or None."""
        if other not in self._identities:
            key = f"{self._prefix}/who/{other}"
            if not store.check([key]):
                return None
            fields = json.loads(store.get(key))
            self._identities[other] = Identity(**{**fields, "process": OsProcess(**fields["process"])})
        identity = self._identities[other]
        if identity.machine == self._machine:
            return "died: its process is gone" if identity.process.gone() else None
        if other != self._neighbour:  # another rank holds a line to it
            return None
        self._line = self._line or Line(identity)
        if self._line.gone():
            return "died: the connection to its process broke"
        if self._line.problem and not self._line_told and time.monotonic() - self._started > RETRY_SECONDS:
            self._line_told = True
            print(
                f"warning: rank {self._rank} cannot connect to rank {other} ({self._line.problem}), "
                f"so its death will be noticed only after distributed.silence_seconds={self._silence_seconds:g}; "
                "let ranks reach any port of each other.",
                file=sys.stderr,
                flush=True,
            )
        return None

    def _guard(self) -> None:
        """End this process when the watching thread has waited for the store for too long: some of the store's calls
        have no time limit, and a machine that has lost its power breaks no connection."""
        seen, quiet = self._rounds, 0
        while not self._leaving.wait(BEAT_SECONDS):
            quiet = quiet + 1 if seen == self._rounds else 0
            seen = self._rounds
            if quiet * BEAT_SECONDS > self._silence_seconds:
                return self._end(
                    "the launcher (or rank 0), which keeps the ranks in touch, gave no sign of life for "
                    f"{self._silence_seconds:.0f} s (distributed.silence_seconds)"
                )

    def _store_lost(self, error: Exception) -> str | None:
        """The verdict after a round that failed: None while the store's process still takes connections."""
        if "MASTER_ADDR" in os.environ and not refused(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        ):
            return None
        return f"the launcher (or rank 0), which keeps the ranks in touch, has ended ({reason(str(error))})"

    def _beat(self, store: dist.TCPStore, rank: int) -> str:
        """What a rank said last, "" where it has said nothing yet."""
        key = f"{self._prefix}/beat/{rank}"
        return store.get(key).decode() if store.check([key]) else ""

    def _tell_stalled(self, store: dist.TCPStore) -> None:
        before = [self._beat(store, rank) for rank in range(self._world)]
        time.sleep(min(SUSPECT_SECONDS, 4 * BEAT_SECONDS))
        places: dict[str, list[int]] = {}
        for rank in range(self._world):
            beat = self._beat(store, rank)
            place = beat.partition(" ")[2] or "a place not told yet"
            if beat == before[rank] and rank != self._rank:
                place = f"silence (stopped, or very slow), last in {place}"
            places.setdefault(place, []).append(rank)
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
        try:
            get_error_handler().record_exception(PeerLost(verdict))
            if self._suspicious.is_set() or os.environ.get("LOCAL_RANK", "0") == "0":
                print(
                    f"error: {verdict}, so rank {self._rank} ends too; {way_on(self._run)}", file=sys.stderr
                )
        finally:  # whatever else is broken, such as the terminal
            exit_now(1)


class _Quiet:
    """For how long ranks have been silent, in seconds during which this process was itself awake.

    A stopped observer counts nothing: one beat of its own is worth `BEAT_SECONDS`, however long it took.
    """

    def __init__(self) -> None:
        self._heard: dict[int, tuple[str, int]] = {}

    def seconds(self, rank: int, told: str, beat: int) -> float:
        """The silence of `rank`, whose last words are `told`, at this process's own `beat`."""
        before, since = self._heard.get(rank, (None, beat))
        if before != told:
            since = beat
            self._heard[rank] = told, since
        return (beat - since) * BEAT_SECONDS


_collecting = threading.Lock()


def _frames() -> dict[int, FrameType]:
    """The frame of each thread, without garbage being collected meanwhile.

    CPython 3.11 holds a lock of all threads while it makes the dictionary. A collection amid that may free a tensor,
    which lets go of the GIL. Another thread that then wants the same lock waits with the GIL in its hands, and the
    process stands still for good (github.com/python/cpython/issues/106883).
    """
    with _collecting:
        on = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()
        finally:
            if on:
                gc.enable()


def whereabouts(thread: int) -> str:
    """The innermost place in this package, "train/step.py:91 (run)", at which a thread of this process is."""
    frame = _frames().get(thread)
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
