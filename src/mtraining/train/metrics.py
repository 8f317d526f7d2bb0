"""Where numbers go: `metrics.jsonl` (one object a step, and one an evaluation) and TensorBoard."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mtraining.errors import UserError

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends records. Resuming at `step` drops what an interrupted run logged beyond it.

    A full disk ends no run, for a failed checkpoint may give space back: records of metrics.jsonl wait in memory until
    they can be written, TensorBoard's curves end, and `tell` says so once.

    Attributes:
        kept: records of the steps up to `step`.
    """

    def __init__(
        self, run: Path, *, step: int = 0, tensorboard: bool = True, tell: Callable[[str], None] = print
    ) -> None:
        path = run / METRICS
        self.kept = kept = [record for record in read_metrics(run) if record["step"] <= step] if step else []
        fresh = path.with_suffix(".jsonl.new")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(fresh, path)
        self._path, self._tell = path, tell
        # Unbuffered, so that what a full disk did not take is known to the byte.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._waiting, self._told = b"", False
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "log.tensorboard=true needs the tensorboard package; install it or set log.tensorboard=false."
                ) from None
            # What an earlier run logged from this step on is shown no more, steps before the first checkpoint included.
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else 0)

    def write(self, record: Mapping[str, Any], curves: Mapping[str, Any] | None = None) -> None:
        """Write one record. Lists (per-layer values) become one TensorBoard curve an entry.

        Args:
            curves: what TensorBoard shows of it; None: all of it.
        """
        self._waiting += json.dumps(record).encode() + b"\n"
        self._append()
        if self._waiting and not self._told:
            self._told = True
            self._tell(f"{self._path}: the disk is full; metrics wait in memory until there is space.")
        if self._board is None:
            return
        try:
            for key, value in (record if curves is None else curves).items():
                if isinstance(value, list):
                    for index, item in enumerate(value):
                        self._board.add_scalar(f"{key}/{index:02d}", item, record["step"])
                elif isinstance(value, (int, float)) and key != "step":
                    self._board.add_scalar(key, value, record["step"])
        except OSError as error:
            self._drop_board(error)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close both."""
        self._append()
        if self._waiting:
            self._tell(
                f"{self._path}: the disk is full; its last {self._waiting.count(10)} records are lost."
            )
        self._file.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                self._drop_board(error)

    def _append(self) -> None:
        """Write what waits, or as much of it as the disk takes."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def _drop_board(self, error: OSError) -> None:
        """Its background thread has ended and cannot be started again."""
        if error.errno != errno.ENOSPC:
            raise error
        self._board = None
        self._tell(
            f"{self._path.parent / 'tensorboard'}: the disk is full; curves end here, metrics.jsonl has them."
        )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run folder, in order; a last line cut short by a crash is left out."""
    return read_records(run / METRICS)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line, up to a line cut short by a crash; none where there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
