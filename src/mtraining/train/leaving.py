"""How a process that shares work with others ends."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import NoReturn

FLUSH_SECONDS = 1.0


def exit_now(code: int) -> NoReturn:
    """Leave at once: a normal exit would wait for background threads that wait for other ranks.

    What is still to be printed gets `FLUSH_SECONDS`: nobody may be reading, and another thread may hold the stream.
    """

    def flush() -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

    with contextlib.suppress(RuntimeError):  # no threads can be started once the interpreter shuts down
        flushing = threading.Thread(target=flush, name="flush", daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)
    os._exit(code)
