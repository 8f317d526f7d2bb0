"""What a run's start takes: the seconds of each part, from the command to the end of the first step.

They are told in one line after the first step and kept in about.json, so that a start that has become slow shows which
part has. A later step that compiles something is told too.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mtraining.kernel.compilations import Compilations, counting_compilations
from mtraining.train.peers import started_at

IMPORTS, FIRST_STEP = "imports", "first step"


def command_began() -> float:
    """When the command of this process was given, in seconds of `time.time`.

    Under torchrun, which is this process's parent, the launcher's own start counts too. A process that a launcher
    starts again after a failure counts from its own start.
    """
    launched = (
        "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    )
    return started_at(os.getppid() if launched else os.getpid())


class StartLog:
    """Counts the seconds of each part of the start, one after another, and what is compiled then and later.

    Args:
        began: when the command was given, in seconds of `time.time`. None: now, which leaves imports out.
    """

    def __init__(self, began: float | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.time() if began is None else began
        self._take: Callable[[], Compilations] = Compilations
        if began is not None:
            self.done(IMPORTS)

    def done(self, part: str) -> None:
        """A part has come to its end; the next one begins."""
        now = time.time()
        self.seconds[part] = self.seconds.get(part, 0.0) + max(0.0, now - self._last)
        self._last = now

    @contextmanager
    def counting(self, device: torch.device) -> Iterator[None]:
        """Count what is compiled inside; Triton's kernels on a GPU only."""
        triton = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        with counting_compilations(triton) as counter:
            self._take = counter.take
            yield

    def step_done(self, step: int, tell: Callable[[str], None]) -> dict[str, Any] | None:
        """After every step: tell of the start after the first of this process, and of what a later one compiled.

        Args:
            step: counted from 1.

        Returns:
            after the first step, what about.json says of the start: seconds by part, and what was compiled.
        """
        compilations = self._take()
        if FIRST_STEP in self.seconds:
            if compilations.any_compiled:
                tell(f"compiled by step {step}: {compilations.render()}{_named(compilations)}")
            return None
        self.done(FIRST_STEP)
        tell(self._render(compilations))
        seconds = {name: round(taken, 3) for name, taken in self.seconds.items()}
        return {"seconds": seconds, **compilations.numbers()}

    def _render(self, compilations: Compilations) -> str:
        parts = ", ".join(f"{name} {taken:.1f}" for name, taken in self.seconds.items())
        compiled = compilations.render()
        return f"start: {sum(self.seconds.values()):.1f} s to the end of the first step ({parts})" + (
            f"; {compiled}" if compiled else ""
        )


def _named(compilations: Compilations) -> str:
    names = ", ".join(sorted(compilations.compiled))
    return f" ({names})" if names else ""
