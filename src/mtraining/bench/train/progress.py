"""How much to measure, and how far a measurement has come: a file of one JSON object a line.

A case may end the processes: out of memory on one GPU leaves the other ranks inside a collective. The launcher then
starts all of them again, and they go on after that case.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtraining.bench.train.record import TrainRow


@dataclass(frozen=True)
class Effort:
    """``warmup`` untimed steps, then up to ``steps`` timed ones, fewer (at least one) where they would take longer
    than ``seconds``."""

    warmup: int = 1
    steps: int = 5
    seconds: float = 60.0


class Progress:
    """What has been done, kept in a file that outlives the processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[TrainRow] = []
        self.failures: list[str] = []
        self.notes: list[str] = []
        self.begun: set[int] = set()
        self.ended: set[int] = set()
        self.path_of_rows: Path | None = None
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            self._take(json.loads(line))

    def tell(self, **event: Any) -> None:
        """Keep an event: ``begin`` or ``end`` a case by number, a ``row``, a ``failure``, a ``note``, a ``path``."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        if "begin" in event:
            self.begun.add(event["begin"])
        if "end" in event:
            self.ended.add(event["end"])
        if "row" in event:
            self.rows.append(TrainRow(**event["row"]))
        if "path" in event:
            self.path_of_rows = Path(event["path"])
        for kind, texts in (("failure", self.failures), ("note", self.notes)):
            if kind in event:
                texts.append(event[kind])
