"""A run that is asked to stop, by its scheduler or by a person, ends after the step in progress and loses nothing.

SIGTERM (time limit, preemption, a container's end), SIGUSR1 (what `--signal` of Slurm is mostly told to send) and
SIGINT (Ctrl-C) all ask the same. A signal may reach one rank only, or ranks at different steps; so it sets a flag that
travels with the loss in the sum that every step makes anyway, and all ranks read the same answer after the same step.

A launcher sends SIGTERM too, to end what is left of a run that has lost a rank. That one is told by the process that is
missing, and ends this one at once: there is nobody to save with.

The main thread may wait for the device or for other ranks for minutes, and Python's signal handlers with it; so a
thread of its own hears of signals, which also ends a process that hangs.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from mtraining.errors import RunStopped
from mtraining.train.leaving import exit_now
from mtraining.train.mesh import Process
from mtraining.train.peers import OsProcess, this_machine
from mtraining.train.watch import way_on

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_SECONDS = 2.0  # a process group and its launcher both pass a signal on: so long it is still the same one


class StopRequest:
    """What one rank knows of a request to stop. Until `defer` and after `at_once`, a signal ends the process."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._why: str | None = "before its first step was done, so there is nothing to save"
        self._heard: dict[int, float] = {}
        self._tell: Callable[[str], None] = print
        self._siblings: list[OsProcess] = []
        self.flag = torch.zeros((), dtype=torch.float64)

    def prepare(self, process: Process, tell: Callable[[str], None]) -> None:
        """Put `flag` (a float64 scalar on the host: 1 after a signal) where the device can read it without the host,
        and learn who the other processes of this launcher are; `tell` prints a line. Collective."""
        self._tell = tell
        self.flag = torch.zeros((), dtype=torch.float64, pin_memory=process.device.type == "cuda")
        launcher = (this_machine(), os.getppid())
        everyone = process.gather_objects((launcher, OsProcess.here()))
        self._siblings = [sibling for parent, sibling in everyone if parent == launcher]

    def defer(self) -> None:
        """There are steps to save: from here on a signal only asks, and the same one again ends the process."""
        self._why = None

    def at_once(self, why: str) -> None:
        """From here on a signal ends the process; `why` completes "stopped by SIGTERM ..."."""
        self._why = why

    def agreed(self, process: Process) -> bool:
        """Whether any rank has been asked, equal on all of them. Collective, and it waits for the device."""
        return bool(process.sum(self.flag.clone().to(process.device)) > 0)

    def hear(self, number: int) -> None:
        """A signal has come."""
        name, now = signal.Signals(number).name, time.monotonic()
        if self._why is not None:
            self._end(number, f"stopped by {name} {self._why}")
        elif number == signal.SIGTERM and any(sibling.gone() for sibling in self._siblings):
            exit_now(128 + number)
        elif number not in self._heard:
            self._heard[number] = now
            self.flag.fill_(1)
            self._tell(
                f"{name}: the run stops after this step and saves a checkpoint; another {name} ends it at once"
            )
        elif now - self._heard[number] > SAME_SECONDS:
            self._end(number, f"stopped by {name}, which came twice, at once")

    def _end(self, number: int, what: str) -> None:
        code = 128 + number
        what = f"{what}; {way_on(self._run)}"
        get_error_handler().record_exception(RunStopped(what, code))
        Console().show_cursor()  # which a live display has hidden
        if parent_process() is None and os.environ.get("LOCAL_RANK", "0") == "0":  # else our launcher tells
            Console(stderr=True).print(f"error: {what}", soft_wrap=True, highlight=False, markup=False)
        exit_now(code)


@contextmanager
def stoppable(run: Path) -> Iterator[StopRequest]:
    """Hear of `SIGNALS` until the end. Only a process's main thread can: in another one signals stay what they are."""
    request = StopRequest(run)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def listen() -> None:
        while numbers := ours.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    request.hear(number)

    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    # The number is written to the socket at once; a handler has to exist for it, and has nothing left to do.
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        theirs.close()
        listener.join(SAME_SECONDS)  # it may be held up in printing
        ours.close()
