"""A bar with the time that is left, on the terminal of the first rank."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtraining.evaluate.results import Key


class Progress:
    """Shows how far an evaluation is, on the first rank's terminal."""

    def __init__(self, title: str, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not shown, transient=True,
        )  # fmt: skip
        self._title = title
        self._task = self._bar.add_task(title, total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def tell(self, key: Key, done: int, total: int) -> None:
        """A sample has ended."""
        self._bar.update(
            self._task, completed=done, total=total, description=f"{self._title}: {key.task} at {key.length}"
        )
