"""What a person sees while a run goes on: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def quiet_libraries() -> None:
    """Turn off other libraries' progress bars: this room has its own. For processes that a command starts."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    quiet_tracker()


def quiet_tracker() -> None:
    """Let Python's helper for semaphores clean up in silence after a process that died or left at once.

    The helper is a process of its own, started with the first other one, and reads its filters from the environment.
    """
    rule = "ignore:resource_tracker:UserWarning"
    rules = os.environ.get("PYTHONWARNINGS", "")
    if rule not in rules:
        os.environ["PYTHONWARNINGS"] = f"{rules},{rule}".lstrip(",")


class Display:
    """Shows progress on the main rank and is silent on every other one."""

    def __init__(self, *, steps: int, done: int, title: str, log_every: int, console: Console | None) -> None:
        self._console, self._steps, self._title, self._log_every = console, steps, title, log_every
        self._live: Progress | None = None
        self._done = self._started_at = done
        self._seconds = 0.0
        if console is not None and console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=console,
            )
            self._task = self._live.add_task(title, total=steps, completed=done, numbers="")

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, text: str) -> None:
        """Print one line above the bar."""
        if self._console is not None:
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def show(self, text: str) -> None:
        """Say beside the bar what goes on now; plain lines leave it out."""
        if self._live is not None:
            self._live.update(self._task, numbers=text)

    def evaluated(self, text: str, seconds: float) -> None:
        """Print the line of an evaluation, and count its seconds to those of the steps."""
        self._seconds += seconds
        self.tell(text)

    def update(self, record: Mapping[str, Any]) -> None:
        """Show one step's record: a terminal shows all, plain lines the first, last and every `log_every`-th."""
        self._done = record["step"]
        self._seconds += record["step_seconds"]
        numbers = f"loss {record['loss']:.4f}  norm {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tok/s"
        if "density" in record:
            numbers += f"  density {record['density']:.1%}"
        if "recall" in record:
            numbers += f"  recall {record['recall']:.1%}"
        if "ring_exposed_fraction" in record:
            numbers += f"  ring waits {record['ring_exposed_fraction']:.1%}"
        if self._live is not None:
            self._live.update(self._task, completed=self._done, numbers=numbers)
        elif self._done in (self._started_at + 1, self._steps) or self._done % self._log_every == 0:
            left = (self._steps - self._done) * self._seconds / (self._done - self._started_at)
            self.tell(
                f"{self._title}  step {self._done}/{self._steps}  {numbers}  lr {record['lr']:.2e}  left {left:.0f} s"
            )
