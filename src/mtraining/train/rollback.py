"""Going back to an earlier checkpoint: what came after it is moved out of the way, never mixed and never lost.

A run folder holds one line of training. A run that goes on from step 2 while steps 4, 6 and 8 are there begins another
one, so those go to `checkpoints/left_behind_<n>/`, with the metrics of their steps. The same holds for damaged
checkpoints, and, where the checkpoint to go on from lies in another folder, for all that this one holds.

`changes.jsonl` of the run folder tells which options the line was trained with before they were what `config.yaml`
says: one object a change, with `option`, `old`, `new`, `step` (the first step that it shows in), and `after` (the step
of the checkpoint that the run went on from).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

from mtraining.train.metrics import METRICS, read_metrics, read_records, write_records
from mtraining.train.policy import Change
from mtraining.train.store import CheckpointStore, step_of
from mtraining.train.trackers import IDS

CHANGES = "changes.jsonl"
BOARD = "tensorboard"


def set_aside(run: Path, checkpoint: Path, step: int) -> str | None:
    """Leave in the run folder what belongs to the line that goes on from `checkpoint`, at `step`, and nothing else.

    Returns:
        A sentence that says what went where; None where nothing had to.
    """
    store = CheckpointStore(run)
    own = checkpoint.resolve().parent == store.folder.resolve()
    behind = [path for path in store.named() if not own or step_of(path) > step]
    strange = [] if own else [name for name in (METRICS, CHANGES, BOARD) if (run / name).exists()]
    if not behind and not strange:
        return None
    aside = next(folder for n in count(1) if not (folder := store.folder / f"left_behind_{n}").exists())
    aside.mkdir(parents=True)
    # A tracker's run belongs to the line that it shows.
    for name in [*strange, *([IDS] if (run / IDS).exists() else [])]:
        (run / name).rename(aside / name)
    if own:
        write_records(aside / METRICS, [record for record in read_metrics(run) if record["step"] > step])
        write_records(
            aside / CHANGES, [record for record in read_records(run / CHANGES) if record["after"] >= step]
        )
    for path in reversed(behind):  # the newest first: an interrupted move leaves an earlier part of the line
        path.rename(aside / path.name)
    names = [path.name for path in behind] or strange
    return (
        f"going on from {checkpoint} leaves {', '.join(names)} behind: moved to {aside}, which may be removed; "
        "checkpoint.resume=auto goes on from what this run saves."
    )


def record_changes(run: Path, changes: Sequence[Change], done: int) -> None:
    """Add the changes made after step `done` to `changes.jsonl`, in place of those that no checkpoint has seen."""
    path = run / CHANGES
    kept = [record for record in read_records(path) if record["after"] < done]
    if path.exists() or changes:
        write_records(path, [*kept, *({**asdict(change), "after": done} for change in changes)])
