"""Large libraries are imported without a search for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage() -> Iterator[None]:
    """Import inside what a process of ours needs from its start.

    PyTorch and transformers make hundreds of thousands of objects that stay. They are not looked through for garbage
    while they are imported, and never afterwards. Nor is anything else that the process has made by then.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if on:
            gc.enable()
