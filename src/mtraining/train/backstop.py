"""The command ends soon after a rank has died, whatever its launcher waits for.

PyTorch's launcher ends the other ranks itself, and mostly within a second. Some of its waits have no end, though: for a
killed process that hangs in a disk, and for one that died while it waited to be dismissed. So a thread counts the time
from the first rank that ended badly. It kills the ranks that are left, and at last leaves the launcher.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mtraining.train.leaving import exit_now
from mtraining.train.peers import OsProcess, children

LOOK_SECONDS = 0.5
# The other ranks are told to end at once and need no more than the watch's few seconds.
KILL_SECONDS = 20.0
# Once no rank runs any more, a launcher needs a moment to say why. Killed ones that hang in a disk do not count.
LEAVE_SECONDS = 10.0


@contextmanager
def backstop(remedy: Callable[[], str], folder: Path) -> Iterator[None]:
    """Bound the wait for the ranks that this process starts inside, from the first one that ends badly.

    Args:
        remedy: how to go on, for the end of the sentence.
        folder: where a rank that has nothing left to do leaves its mark; see `mark_done`.
    """
    over = threading.Event()
    thread = threading.Thread(target=_look, args=(remedy, folder, over), name="backstop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * LOOK_SECONDS)


def mark_done(folder: Path) -> None:
    """Say that this rank's end will be no failure."""
    (folder / f"done.{os.getpid()}").touch()


def ranks_of(launcher: int) -> list[OsProcess]:
    """The rank processes of a launcher, in the order they were started.

    They are read from the process table: `multiprocessing.active_children` would collect the exit code of one that has
    ended, under the launcher's hands.
    """
    return [process for process in children(launcher) if _is_spawned(process)]


def _is_spawned(process: OsProcess) -> bool:
    """True of ranks; the helper of multiprocessing that tracks semaphores is started in another way."""
    try:
        return b"spawn_main" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except OSError:
        return False


def _look(remedy: Callable[[], str], folder: Path, over: threading.Event) -> None:
    ranks: set[OsProcess] = set()
    lost: OsProcess | None = None
    since = all_since = 0.0
    while not over.wait(LOOK_SECONDS):
        ranks.update(ranks_of(os.getpid()))
        if lost is None:
            ended = (rank for rank in ranks if rank.gone() and not (folder / f"done.{rank.pid}").exists())
            lost, since = next(ended, None), time.monotonic()
        if lost is None:
            continue
        running = [rank for rank in ranks if not rank.gone()]
        if running:
            all_since = time.monotonic()
        if running and time.monotonic() - since > KILL_SECONDS:
            for rank in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
        if time.monotonic() - max(since, all_since) > LEAVE_SECONDS:
            print(
                f"error: a rank (process {lost.pid}) died, and its launcher still waits for it or another one (a disk "
                f"that does not answer?), so the command ends; {remedy()}",
                file=sys.stderr,
            )
            exit_now(1)
