"""The checkpoint folder of a run: names, completeness, and which ones stay. Files only, no tensors.

    checkpoints/step_00000020/            complete: manifest.json, written last, has size and digest of every file
    checkpoints/step_00000030.partial/    being written, or left by a run that died while writing
    checkpoints/left_behind_1/            what a roll-back to an earlier step left behind (see rollback.py)
    best -> checkpoints/step_00000020     the one of the lowest held-out loss, with `evaluate.keep_best`

A checkpoint becomes complete in one atomic rename, after its files are on disk. The manifest also says what a reader
must know before touching a tensor: the step, every option of the run, the model, the data, every parameter's shape.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import TABLES

MANIFEST = "manifest.json"
BEST = "best"
_NAME = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class FileRecord:
    """What a file must be: its size in bytes and its xxh3 (128 bits, hexadecimal). `digest` is "" in checkpoints of
    before digests were kept: of those only the size can be checked."""

    bytes: int
    digest: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of.

    step: optimizer steps done; world: processes that wrote it; shapes: parameter name -> shape; files: name -> what it
    must be; options: every option of the run, as `mtraining.train.policy.flat_options` has them; model and corpus: who
    the model and the data are, as `mtraining.train.identity` has it; tiles: which tile sizes attention was computed
    with, as `mtraining.kernel.measured_tiles.tiles_in_use` says; frozen: which weights are under a low-rank adapter, as
    `mtraining.train.frozen` has it ("": none, every weight is in the checkpoint).

    Checkpoints of before these were kept have few options, no model, no corpus, no digests, and tiles of "tables".
    """

    step: int
    world: int
    shapes: Mapping[str, list[int]]
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    corpus: str = ""
    tiles: str = TABLES
    frozen: str = ""

    @property
    def older(self) -> bool:
        """Whether it was written before digests, model, data and all options were kept."""
        return not any(record.digest for record in self.files.values())


class CheckpointStore:
    """The checkpoints of one run folder. All of them are of one line of training: none is newer than a later one."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "checkpoints"
        self.pointer = run / BEST

    def path(self, step: int) -> Path:
        """Where the complete checkpoint of `step` lives."""
        return self.folder / f"step_{step:08d}"

    def partial(self, step: int) -> Path:
        """Where the checkpoint of `step` is written before it is complete."""
        return self.folder / f"step_{step:08d}.partial"

    def find(self, name: str) -> Path:
        """The checkpoint that is meant: `best`, the name of one in the run folder, or a path. It may be absent."""
        if name == BEST:
            return self.pointer.resolve()
        here = self.folder / name
        return here if here.is_dir() else Path(name)

    def named(self) -> list[Path]:
        """Every checkpoint that was complete once, usable or not, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))

    def complete(self) -> list[Path]:
        """The usable checkpoints, oldest first, as far as sizes tell."""
        return [path for path in self.named() if problem(path) is None]

    def latest(self) -> Path | None:
        """The newest usable checkpoint, or None."""
        return next((path for path in reversed(self.named()) if problem(path) is None), None)

    def broken(self) -> dict[Path, str]:
        """Half-written or damaged checkpoints and what is wrong with each, as far as sizes tell."""
        found = {path: problem(path) for path in self.named()}
        found.update(dict.fromkeys(sorted(self.folder.glob("step_*.partial")), "it was still being written"))
        return {path: reason for path, reason in found.items() if reason is not None}

    def begin(self, step: int) -> Path:
        """An empty place to write the checkpoint of `step`; leftovers of an earlier attempt go."""
        partial = self.partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def commit(
        self,
        step: int,
        manifest: Manifest,
        files: Mapping[str, FileRecord],
        keep_last: int,
        losses: Mapping[int, float] | None = None,
    ) -> Path:
        """Make the partial checkpoint of `step` the newest complete one, then drop all but the last `keep_last`.

        Older checkpoints go only after the new one is durable.

        Args:
            files: what was written, by name, as those who wrote it say; it becomes `manifest.files`.
            losses: held-out losses by step, of which the checkpoint with the lowest stays too; None keeps no best one.

        Raises:
            OSError: a file is not there in its full size.
        """
        partial, final = self.partial(step), self.path(step)
        for name, file in files.items():
            if (size := (partial / name).stat().st_size) != file.bytes:
                raise OSError(errno.EIO, f"{name} has {size} of {file.bytes} bytes")
        with open(partial / MANIFEST, "w", encoding="utf-8") as out:
            out.write(_seal(asdict(replace(manifest, files=files))))
            out.flush()
            os.fsync(out.fileno())
        _sync_folder(partial)
        if final.exists():  # a repeated save of the same step
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync_folder(self.folder)
        best = self.point_at_best(losses) if losses is not None else None
        for old in self.complete()[:-keep_last]:
            if old != best:
                shutil.rmtree(old)
        if self.pointer.is_symlink() and not self.pointer.exists():
            self.pointer.unlink()
        return final

    def point_at_best(self, losses: Mapping[int, float]) -> Path | None:
        """Let `best` of the run folder point to the checkpoint with the lowest of the losses, by step; the earliest of
        equals. Its path, or None where no checkpoint has a finite loss: then there is no `best`."""
        known = {path: losses.get(step_of(path), math.inf) for path in self.complete()}
        best = min(
            (path for path in known if math.isfinite(known[path])), key=known.__getitem__, default=None
        )
        if best is None:
            self.pointer.unlink(missing_ok=True)
            return None
        fresh = self.pointer.with_name(f"{BEST}.new")
        fresh.unlink(missing_ok=True)
        # Relative, so that a run folder may move.
        fresh.symlink_to(best.relative_to(self.pointer.parent))
        os.replace(fresh, self.pointer)
        return best

    def abandon(self, step: int) -> None:
        """Remove a partial checkpoint whose saving failed, giving its space back."""
        shutil.rmtree(self.partial(step), ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint folder says."""
    found = _NAME.match(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[1])


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None when it is complete: every file there, at its full size.

    Digests of files are not looked at, which takes time: see `mtraining.train.digest.damage`.
    """
    if checkpoint.name.endswith(".partial"):
        return "it was still being written"
    try:
        manifest = read_manifest(checkpoint)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, TypeError, KeyError, AttributeError, OSError):
        return f"its {MANIFEST} is damaged"
    for name, record in manifest.files.items():
        try:
            size = (checkpoint / name).stat().st_size
        except FileNotFoundError:  # also of a checkpoint that rank 0 is dropping just now
            return f"{name} is missing"
        if size != record.bytes:
            return f"{name} has {size} of {record.bytes} bytes"
    return None


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint; FileNotFoundError when it is absent, another error when it is damaged."""
    raw = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    if "data" in raw:  # written before digests and the whole configuration were kept
        raw["options"] = raw.pop("data")
        raw["files"] = {name: {"bytes": size} for name, size in raw["files"].items()}
    elif raw.pop("digest") != _digest(raw):
        raise ValueError("the manifest's digest is another")
    files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
    if any(Path(name).name != name for name in files):
        raise ValueError("a file outside the checkpoint")
    return Manifest(**raw, files=files)


def _seal(record: dict[str, Any]) -> str:
    """A manifest as text that tells if a bit of it changes."""
    return json.dumps({**record, "digest": _digest(record)})


def _digest(record: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def require_complete(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint that must be usable; otherwise a sentence naming it and the newest that is."""
    if not checkpoint.is_dir():
        raise UserError(
            f"checkpoint {checkpoint} does not exist; set checkpoint.resume to a step folder or to auto."
        )
    reason = problem(checkpoint)
    if reason is None:
        return read_manifest(checkpoint)
    refuse(checkpoint, f"half-written ({reason})")


def refuse(checkpoint: Path, what: str) -> NoReturn:
    """Raise the `UserError` about a checkpoint that was asked for by name and cannot be used."""
    beside = CheckpointStore(checkpoint.parent.parent)
    good = [path for path in beside.complete() if path.name != checkpoint.name]
    remedy = f"the newest complete one is {good[-1]}" if good else "no complete one lies beside it"
    raise UserError(f"checkpoint {checkpoint} is {what}; {remedy}: set checkpoint.resume accordingly.")


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
