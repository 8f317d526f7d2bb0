"""The checkpoint folder of a run: names, completeness, and which ones stay. Files only, no tensors.

    checkpoints/step_00000020/            complete: holds manifest.json, written last, with the size of every file
    checkpoints/step_00000030.partial/    being written, or left by a run that died while writing

A checkpoint becomes complete in one atomic rename, after its files are on disk. The manifest also says what a reader
must know before touching a tensor: the step, what fixes the order of samples, and every parameter's name and shape.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import TABLES

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of.

    step: optimizer steps done; world: processes that wrote it; data: the options that fix which samples a step sees;
    shapes: parameter name -> shape; files: name -> bytes; tiles: which tile sizes attention was computed with, as
    `mtraining.kernel.measured_tiles.tiles_in_use` says, "tables" in checkpoints of before they could be measured.
    """

    step: int
    world: int
    data: dict[str, str | int]
    shapes: dict[str, list[int]]
    files: dict[str, int]
    tiles: str = TABLES


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"

    def path(self, step: int) -> Path:
        """Where the complete checkpoint of `step` lives."""
        return self.folder / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Where the checkpoint of `step` is written before it is complete."""
        return self.folder / f"step_{step:08d}.partial"

    def complete(self) -> list[Path]:
        """The usable checkpoints, oldest first."""
        return [path for path in self._named() if problem(path) is None]

    def latest(self) -> Path | None:
        """The newest usable checkpoint, or None."""
        return next((path for path in reversed(self._named()) if problem(path) is None), None)

    def broken(self) -> dict[Path, str]:
        """Half-written or damaged checkpoints and what is wrong with each."""
        found = {path: problem(path) for path in self._named()}
        found.update(dict.fromkeys(sorted(self.folder.glob("step_*.partial")), "it was still being written"))
        return {path: reason for path, reason in found.items() if reason is not None}

    def begin(self, step: int) -> Path:
        """An empty place to write the checkpoint of `step`; leftovers of an earlier attempt go."""
        partial = self.partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def commit(self, step: int, manifest: Manifest, keep_last: int) -> Path:
        """Make the partial checkpoint of `step` the newest complete one, then drop all but the last `keep_last`.

        `manifest.files` is filled in here. Older checkpoints go only after the new one is durable.
        """
        partial, final = self.partial(step), self.path(step)
        sizes = {path.name: path.stat().st_size for path in partial.iterdir() if path.is_file()}
        record = {**asdict(manifest), "files": sizes}
        with open(partial / MANIFEST, "w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(partial)
        if final.exists():  # a damaged or repeated save of the same step
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync_folder(self.folder)
        for old in self.complete()[:-keep_last]:
            shutil.rmtree(old)
        return final

    def abandon(self, step: int) -> None:
        """Remove a partial checkpoint whose saving failed, giving its space back."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def _named(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None when it is complete: every file there, at its full size."""
    if checkpoint.name.endswith(".partial"):
        return "it was still being written"
    try:
        manifest = read_manifest(checkpoint)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, TypeError):
        return f"its {MANIFEST} is damaged"
    for name, size in manifest.files.items():
        file = checkpoint / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint; FileNotFoundError or ValueError when it is absent or damaged."""
    return Manifest(**json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")))


def require_complete(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint that must be usable; otherwise a sentence naming it and the newest that is."""
    if not checkpoint.is_dir():
        raise UserError(
            f"checkpoint {checkpoint} does not exist; set checkpoint.resume to a step folder or to auto."
        )
    reason = problem(checkpoint)
    if reason is None:
        return read_manifest(checkpoint)
    latest = CheckpointStore(checkpoint.parent.parent).latest()
    remedy = f"the newest complete one is {latest}" if latest else "no complete one lies beside it"
    raise UserError(
        f"checkpoint {checkpoint} is half-written ({reason}); {remedy}: set checkpoint.resume accordingly."
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def full_disk_told(run: Path) -> Iterator[None]:
    """Whatever meets a full disk inside becomes one sentence, with where to go on from."""
    try:
        yield
    except Exception as error:
        # safetensors, written in Rust, raises an error of its own and has the reason in its text only
        if getattr(error, "errno", None) != errno.ENOSPC and os.strerror(errno.ENOSPC) not in str(error):
            raise
        latest = CheckpointStore(run).latest()
        raise UserError(
            f"output={run}: the disk is full; free space there and run the same command again to go on from "
            f"{latest or 'the start'}."
        ) from None
