"""Saving and resuming through torch.distributed.checkpoint: asynchronous, atomic, and free to change topology.

Tensors are saved under their parameters' names as sharded tensors, so any number of ranks can read what any other
number wrote. Besides model and optimizer each rank saves its random state (restored only when the number of ranks is
the same); the order of the data and the learning rate are functions of the step, and need no state.
"""

from __future__ import annotations

import errno
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import TABLES, tiles_path
from mtraining.model import ParallelLM
from mtraining.train.checks import check_cursor, check_same_model, data_order
from mtraining.train.config import Config
from mtraining.train.mesh import Runtime
from mtraining.train.store import CheckpointStore, Manifest, require_complete

# What any rank's failure becomes on every rank derives from BaseException alone.
SAVE_ERRORS = (Exception, CheckpointException)


@dataclass
class _Pending:
    """A save under way: its step, what its manifest will say, and the future of the background write."""

    step: int
    manifest: Manifest
    future: Future[Any]


class Checkpointer:
    """Saves and restores one run. Every method is collective unless it says otherwise."""

    def __init__(
        self,
        config: Config,
        place: Runtime,
        model: ParallelLM,
        optimizer: torch.optim.Optimizer,
        tiles: str,
        tell: Any = print,
    ) -> None:
        self.store = CheckpointStore(config.output)
        self._config, self._place, self._model, self._optimizer = config, place, model, optimizer
        self._tiles, self._tell = tiles, tell
        # Background saving has collectives of its own, which must not meet those of training on one group.
        self._group = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=config.distributed.timeout_seconds)
        )
        self._pending: _Pending | None = None

    def resume(self) -> int:
        """Restore what `checkpoint.resume` asks for; the number of optimizer steps already done (0: a fresh start)."""
        found = self._place.from_main(self._choose() if self._place.is_main else None)
        if isinstance(found, UserError):
            raise found
        if found is None:
            return 0
        manifest = require_complete(found)
        check_cursor(self._config, manifest)
        check_same_model(self._shapes(), manifest, str(found))
        reader = FileSystemReader(str(found))
        state = self._state(with_random=manifest.world == self._place.world)
        indices = _stored(reader, "indices")
        if indices:  # absent from checkpoints of before they were kept
            state["indices"] = indices
        dcp.load(state, storage_reader=reader, process_group=self._group)
        set_state_dict(
            self._model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        if indices:
            self._model.indices.restore(indices, self._place.device)
        if "random" in state:
            self._restore_random(state["random"])
        if self._place.is_main:
            self._tell(f"resuming from {found} (step {manifest.step})")
            if manifest.tiles != self._tiles:
                self._tell(_other_tiles(manifest.tiles, self._tiles, tiles_path(self._place.device)))
        return manifest.step

    def save(self, step: int) -> None:
        """Save after `step` optimizer steps; with `checkpoint.async` it returns once the state is copied aside.

        An earlier save that is still being written is waited for first.
        """
        self.finish()
        if self._place.is_main:
            shutil.rmtree(self.store.partial(step), ignore_errors=True)
        dist.barrier(group=self._group)
        state = self._state(with_random=True) | {"indices": self._model.indices.state()}
        manifest = Manifest(
            step=step,
            world=self._place.world,
            data=data_order(self._config),
            shapes=self._shapes(),
            files={},
            tiles=self._tiles,
        )
        writer = FileSystemWriter(self.store.partial(step), sync_files=True)
        if self._config.checkpoint.asynchronous:
            future = dcp.async_save(state, storage_writer=writer, process_group=self._group)
            assert isinstance(future, Future)  # the threaded checkpointer's return type
        else:
            future = Future()
            try:
                future.set_result(dcp.save(state, storage_writer=writer, process_group=self._group))
            except SAVE_ERRORS as error:
                future.set_exception(error)
        self._pending = _Pending(step, manifest, future)
        if not self._config.checkpoint.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Complete a background save that has come to its end. Not collective, never waits."""
        if self._pending is not None and self._pending.future.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save under way, if any, and make it the newest checkpoint. Not collective.

        A save that fails (a full disk) costs nothing but itself: it is removed, the last good checkpoint stays, one
        sentence says so, and the next save tries again; `require_saved` makes the last save of a run count.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.future.result()
            if self._place.is_main:
                self.store.commit(pending.step, pending.manifest, self._config.checkpoint.keep_last)
        except SAVE_ERRORS as error:
            if self._place.is_main:
                self.store.abandon(pending.step)
                self._tell(self._failure(pending.step, error))

    def require_saved(self, step: int) -> Path:
        """Finish, and insist that the checkpoint of `step` is there: its path, or `UserError`."""
        self.finish()
        saved = self._place.from_main(self.store.path(step) in self.store.complete())
        if not saved:
            raise UserError(
                f"the checkpoint of step {step} could not be saved in {self.store.folder}; the last good checkpoint is "
                f"{self.store.latest() or 'none'}: free space there and run the same command again to go on from it."
            )
        return self.store.path(step)

    def _choose(self) -> Path | UserError | None:
        """The checkpoint to start from, decided on the main rank alone so that all ranks agree."""
        resume = self._config.checkpoint.resume
        try:
            if resume == "never":
                return None
            if resume != "auto":
                require_complete(self._config.resume_path)
                return self._config.resume_path
        except UserError as error:
            return error
        for path, reason in self.store.broken().items():
            self._tell(f"skipping half-written checkpoint {path}: {reason}")
        return self.store.latest()

    def _state(self, *, with_random: bool) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if with_random:
            random = {f"cpu.{self._place.rank}": torch.get_rng_state()}
            if self._place.device.type == "cuda":
                random[f"cuda.{self._place.rank}"] = torch.cuda.get_rng_state(self._place.device)
            state["random"] = random
        return state

    def _restore_random(self, random: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(random[f"cpu.{self._place.rank}"])
        if self._place.device.type == "cuda":
            torch.cuda.set_rng_state(random[f"cuda.{self._place.rank}"], self._place.device)

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self._model.named_parameters()}

    def _failure(self, step: int, error: BaseException) -> str:
        causes = [error, *(getattr(error, "failures", None) or {}).values()]
        causes = [cause[0] if isinstance(cause, tuple) else cause for cause in causes]
        full = any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes)
        reason = "the disk is full" if full else " ".join(str(causes[-1]).split())
        if (
            "inline_container" in reason
        ):  # torch's writer of a file, stopped short, hides the system's own error
            reason = "a file could not be written to its end (is the disk full?)"
        return (
            f"checkpoint of step {step} was not saved in {self.store.folder}: {reason}; the last good checkpoint "
            f"{self.store.latest() or '(none yet)'} stays, and the next save tries again."
        )


def _other_tiles(then: str, now: str, path: Path) -> str:
    remedy = f"move {path} away" if then == TABLES else f"bring back the {path} of then"
    return (
        f"warning: the checkpoint was computed with other tiles of attention ({then}) than are in use here ({now}), so "
        f"results will differ in their last bits from those of an uninterrupted run; for the same bits {remedy}."
    )


def _stored(reader: FileSystemReader, section: str) -> dict[str, torch.Tensor]:
    """Empty tensors like those that a checkpoint keeps under ``section``, to be loaded into."""
    stored = reader.read_metadata().state_dict_metadata
    return {
        name.removeprefix(f"{section}."): torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if name.startswith(f"{section}.") and isinstance(meta, TensorStorageMetadata)
    }
