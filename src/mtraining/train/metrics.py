"""Where numbers go: `metrics.jsonl` (one object a step, and one an evaluation), and trackers."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mtraining.errors import first_line
from mtraining.inputs.text import replace_text
from mtraining.train.trackers import Tracker, numbers

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends records. Resuming at `step` drops what an interrupted run logged beyond it.

    A full disk ends no run, for a failed checkpoint may give space back: records of metrics.jsonl wait in memory until
    they can be written. Nor does a tracker that fails: its curves end, and `tell` says so once.

    Attributes:
        kept: records of the steps up to `step`.
    """

    def __init__(
        self,
        run: Path,
        *,
        step: int = 0,
        trackers: Sequence[Tracker] = (),
        tell: Callable[[str], None] = print,
    ) -> None:
        path = run / METRICS
        self.kept = kept = [record for record in read_metrics(run) if record["step"] <= step] if step else []
        write_records(path, kept)
        self._path, self._tell = path, tell
        # Unbuffered, so that what a full disk did not take is known to the byte.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._waiting, self._told = b"", False
        self._trackers = list(trackers)

    def write(self, record: Mapping[str, Any], curves: Mapping[str, Any] | None = None) -> None:
        """Write one record. Lists (per-layer values) become one curve an entry in trackers.

        Args:
            curves: what trackers show of it; None: all of it.
        """
        self._waiting += json.dumps(record).encode() + b"\n"
        self._append()
        if self._waiting and not self._told:
            self._told = True
            self._tell(f"{self._path}: the disk is full; metrics wait in memory until there is space.")
        values = numbers(record if curves is None else curves)
        for tracker in list(self._trackers):
            try:
                tracker.log(values, record["step"])
            except Exception as error:  # each library has kinds of its own
                self._drop(tracker, error)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Flush and close all of them; `failed`: an error ended the run."""
        self._append()
        if self._waiting:
            self._tell(
                f"{self._path}: the disk is full; its last {self._waiting.count(10)} records are lost."
            )
        self._file.close()
        for tracker in list(self._trackers):
            try:
                tracker.close(failed)
            except Exception as error:
                self._drop(tracker, error)

    def _append(self) -> None:
        """Write what waits, or as much of it as the disk takes."""
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def _drop(self, tracker: Tracker, error: Exception) -> None:
        """Give it nothing more. TensorBoard's background thread, once ended by a full disk, cannot be started again."""
        self._trackers.remove(tracker)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        why = "the disk is full" if full else first_line(error).rstrip(".")
        self._tell(f"log.trackers: {tracker.name}: {why}; its curves end here, {METRICS} has them.")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run folder, in order; a last line cut short by a crash is left out."""
    return read_records(run / METRICS)


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file by these objects, one a line."""
    replace_text(path, "".join(json.dumps(record) + "\n" for record in records))


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
