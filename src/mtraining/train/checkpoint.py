"""Saving and resuming through torch.distributed.checkpoint: asynchronous, atomic, and free to change topology.

Tensors are saved under their parameters' names as sharded tensors, so any number of ranks can read what any other
number wrote. Besides model and optimizer each rank saves its random state (restored only when the number of ranks is
the same); the order of the data and the learning rate are functions of the step, and need no state. Weights that a
low-rank adapter leaves as they are stay where they came from; the manifest says which they are.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import TABLES, tiles_path
from mtraining.model import ParallelLM
from mtraining.model.adapters import without_frozen
from mtraining.train.config import Config
from mtraining.train.digest import DigestWriter
from mtraining.train.frozen import frozen_weights
from mtraining.train.identity import model_identity
from mtraining.train.mesh import Process
from mtraining.train.moments_saved import OtherForm
from mtraining.train.optim import options_kept
from mtraining.train.policy import flat_options
from mtraining.train.reader import SafeReader, load
from mtraining.train.resume import check_same_run, find, on_main
from mtraining.train.rollback import record_changes, set_aside
from mtraining.train.store import CheckpointStore, Manifest
from mtraining.train.watch import failed_collective

# What any rank's failure becomes on every rank derives from BaseException alone.
SAVE_ERRORS = (Exception, CheckpointException)


@dataclass
class _Pending:
    """A save under way: its step, what its manifest will say, who writes it, and the future of the background write."""

    step: int
    manifest: Manifest
    writer: DigestWriter
    future: Future[Any]


class Checkpointer:
    """Saves and restores one run. Every method is collective unless it says otherwise.

    Attributes:
        saved: the step that was saved or restored last.
    """

    def __init__(
        self,
        config: Config,
        process: Process,
        model: ParallelLM,
        optimizer: torch.optim.Optimizer,
        corpus: Callable[[], str],
        tiles: str,
        tell: Any = print,
    ) -> None:
        self.store = CheckpointStore(config.output)
        self._config, self._process, self._model, self._optimizer = config, process, model, optimizer
        self._read_corpus, self._tiles, self._tell = corpus, tiles, tell
        self._corpus = self._frozen = ""
        # Background saving has collectives of its own, which must not meet those of training on one group.
        self._group = dist.new_group(
            backend="gloo", timeout=timedelta(seconds=config.distributed.timeout_seconds)
        )
        self._pending: _Pending | None = None
        self.saved = 0
        # Held-out losses by step, where `evaluate.keep_best` asks for the best checkpoint.
        self._losses: dict[int, float] | None = None

    def keep_best(self, losses: Mapping[int, float]) -> None:
        """From here on the checkpoint of the lowest held-out loss stays; `losses` are those of evaluations so far."""
        self._losses = dict(losses)
        if self._process.is_main:
            self.store.point_at_best(self._losses)

    def resume(self) -> int:
        """Restore what `checkpoint.resume` asks for; the number of optimizer steps already done (0: a fresh start).

        What differs from the checkpoint and may is told and written down, and later checkpoints are set aside.
        """
        config, process, tell = self._config, self._process, self._tell
        self._corpus = on_main(process, self._read_corpus)
        self._frozen = frozen_weights(self._model, process)
        found = find(config, process, tell)
        if found is None:
            on_main(process, lambda: record_changes(config.output, [], 0))
            return 0
        path, manifest = found
        changes = check_same_run(
            config, found, self._shapes(), self._model.hf_model.config, self._corpus, self._frozen
        )
        self._restore(path, manifest)
        self.saved = manifest.step
        behind = on_main(process, lambda: set_aside(config.output, path, manifest.step))
        on_main(process, lambda: record_changes(config.output, changes, manifest.step))
        tell(f"resuming from {path} (step {manifest.step})")
        for line in [behind, *(f"{change} from step {change.step} on" for change in changes)]:
            if line is not None:
                tell(line)
        if manifest.older:
            tell(
                f"warning: {path} was written before digests, model and data were kept, so it is not checked that they "
                "are whole and the same."
            )
        if manifest.tiles != self._tiles:
            tell(_other_tiles(manifest.tiles, self._tiles, tiles_path(process.device)))
        return manifest.step

    def _restore(self, path: Path, manifest: Manifest) -> None:
        """Fill model, optimizer, held indices and random state. Collective."""
        reader = SafeReader(str(path))
        state = self._state(with_random=manifest.world == self._process.world)
        indices = reader.shapes_of("indices")
        if indices:  # absent from checkpoints of before they were kept
            state["indices"] = indices
        moments = OtherForm(state["optimizer"], state["model"], reader.read_metadata().state_dict_metadata)
        load(state, reader, self._group)
        moments.convert()
        with options_kept(self._optimizer):
            set_state_dict(
                self._model,
                self._optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                # What is read names every trained tensor; frozen ones are not in a checkpoint.
                options=StateDictOptions(strict=not self._frozen),
            )
        if indices:
            self._model.indices.restore(indices, self._process.device)
        if "random" in state:
            self._restore_random(state["random"])

    def save(self, step: int) -> None:
        """Save after `step` optimizer steps; with `checkpoint.async` it returns once the state is copied aside.

        An earlier save that is still being written is waited for first.
        """
        self.finish()
        if self._process.is_main:
            shutil.rmtree(self.store.partial(step), ignore_errors=True)
        dist.barrier(group=self._group)
        state = self._state(with_random=True) | {"indices": self._model.indices.state()}
        manifest = Manifest(
            step=step,
            world=self._process.world,
            shapes=self._shapes(),
            options=flat_options(self._config),
            model=model_identity(self._model.hf_model.config),
            corpus=self._corpus,
            tiles=self._tiles,
            frozen=self._frozen,
        )
        writer = DigestWriter(self.store.partial(step))
        self.saved = step
        if self._config.checkpoint.asynchronous:
            future = dcp.async_save(state, storage_writer=writer, process_group=self._group)
            assert isinstance(future, Future)  # the threaded checkpointer's return type
        else:
            future = Future()
            try:
                future.set_result(dcp.save(state, storage_writer=writer, process_group=self._group))
            except SAVE_ERRORS as error:
                future.set_exception(error)
        self._pending = _Pending(step, manifest, writer, future)
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
            if self._process.is_main:
                keep_last = self._config.checkpoint.keep_last
                files = pending.writer.files
                self.store.commit(pending.step, pending.manifest, files, keep_last, self._losses)
        except SAVE_ERRORS as error:
            # A rank is gone, or waited too long: no later save of this group of processes can succeed.
            if failed_collective(error):
                raise
            if self._process.is_main:
                self.store.abandon(pending.step)
                self._tell(self._failure(pending.step, error))

    def require_saved(self, step: int) -> Path:
        """Finish, and insist that the checkpoint of `step` is there: its path, or `UserError`."""
        self.finish()
        saved = self._process.from_main(self.store.path(step) in self.store.complete())
        if not saved:
            raise UserError(
                f"the checkpoint of step {step} could not be saved in {self.store.folder}; the last good checkpoint is "
                f"{self.store.latest() or 'none'}: free space there and run the same command again to go on from it."
            )
        return self.store.path(step)

    def _state(self, *, with_random: bool) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        state: dict[str, Any] = {"model": without_frozen(self._model, model), "optimizer": optimizer}
        if with_random:
            random = {f"cpu.{self._process.rank}": torch.get_rng_state()}
            if self._process.device.type == "cuda":
                random[f"cuda.{self._process.rank}"] = torch.cuda.get_rng_state(self._process.device)
            state["random"] = random
        return state

    def _restore_random(self, random: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(random[f"cpu.{self._process.rank}"])
        if self._process.device.type == "cuda":
            torch.cuda.set_rng_state(random[f"cuda.{self._process.rank}"], self._process.device)

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self._model.named_parameters()}

    def _failure(self, step: int, error: BaseException) -> str:
        causes = [error, *(getattr(error, "failures", None) or {}).values()]
        causes = [cause[0] if isinstance(cause, tuple) else cause for cause in causes]
        full = any(isinstance(cause, OSError) and cause.errno == errno.ENOSPC for cause in causes)
        reason = "the disk is full" if full else " ".join(str(causes[-1]).split())
        # torch's writer of a file, stopped short, hides the system's own error.
        if "inline_container" in reason:
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
