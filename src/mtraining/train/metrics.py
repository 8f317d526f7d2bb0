"""Where numbers go: `metrics.jsonl` (one object a step) and TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mtraining.errors import UserError

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends one record a step. Resuming at `step` drops what an interrupted run logged beyond it."""

    def __init__(self, run: Path, *, step: int = 0, tensorboard: bool = True) -> None:
        path = run / METRICS
        kept = [record for record in read_metrics(run) if record["step"] <= step] if step else []
        fresh = path.with_suffix(".jsonl.new")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        os.replace(fresh, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError(
                    "log.tensorboard=true needs the tensorboard package; install it or set log.tensorboard=false."
                ) from None
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one step's record. Lists (per-layer values) become one TensorBoard curve an entry."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is None:
            return
        for key, value in record.items():
            if isinstance(value, list):
                for index, item in enumerate(value):
                    self._board.add_scalar(f"{key}/{index:02d}", item, record["step"])
            elif isinstance(value, (int, float)) and key != "step":
                self._board.add_scalar(key, value, record["step"])

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close both."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run folder, in order; a last line cut short by a crash is left out."""
    path = run / METRICS
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
