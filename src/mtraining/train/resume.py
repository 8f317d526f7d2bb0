"""Finding the checkpoint that a run goes on from, and making sure that it is what it says it is.

In this order: whole by its manifest and sizes, whole by its digests (all ranks share the reading), of this run by its
options, model and data. Only then is a tensor read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mtraining.errors import UserError
from mtraining.train.config import Config
from mtraining.train.digest import damage, share
from mtraining.train.identity import (
    check_options,
    check_shapes,
    model_changes,
    model_identity,
    require_allowed,
)
from mtraining.train.mesh import Process
from mtraining.train.policy import Change
from mtraining.train.store import CheckpointStore, Manifest, problem, read_manifest, refuse, require_complete

T = TypeVar("T")


def on_main(process: Process, work: Callable[[], T]) -> T:
    """What `work` gives on the main rank, on every rank; its `UserError` is every rank's. Collective."""
    found: T | UserError | None = None
    if process.is_main:
        try:
            found = work()
        except UserError as error:
            found = error
        except OSError as error:
            found = UserError(f"the output folder cannot be used ({error}); mend it, or choose another.")
    found = process.from_main(found)
    if isinstance(found, UserError):
        raise found
    return found  # type: ignore[return-value]


def check_same_run(
    config: Config,
    found: tuple[Path, Manifest],
    shapes: dict[str, list[int]],
    hf_config: Any,
    corpus: str,
    frozen: str,
) -> list[Change]:
    """Whether this run's options, model and data are the checkpoint's; what is not, and may be.

    Args:
        shapes: of this run's parameters, by name.
        hf_config: of this run's model, as it was built.
        corpus: of this run's data, as `SequenceDataset.identity` has it.
        frozen: the weights that it does not train, as `frozen_weights` has them.

    Raises:
        UserError: naming what differs, with what it was and what it is.
    """
    path, manifest = found
    changes = check_options(config, path, manifest)
    check_shapes(shapes, manifest, path)
    if manifest.older:
        return changes
    step = manifest.step + 1
    others = model_changes(manifest.model, model_identity(hf_config), step)
    if manifest.corpus != corpus:
        option = "data.path" if config.data.path is not None else "data.sources"
        others.append(Change(step, option, manifest.corpus, corpus))
    if manifest.frozen != frozen:
        others.append(Change(step, "model.init", f"weights {manifest.frozen}", f"weights {frozen}"))
    require_allowed(others, path, config.checkpoint.allow)
    return changes + others


def find(config: Config, process: Process, tell: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The checkpoint that `checkpoint.resume` asks for; None: there is none, the run is a fresh one. Collective.

    Of `auto` a damaged or half-written checkpoint is told and the one before it is taken.

    Raises:
        UserError: one that was asked for by name cannot be used, or none of those that are there.
    """
    asked = config.checkpoint.resume
    if asked == "never":
        return None
    if asked != "auto":
        path = config.resume_path
        manifest = on_main(process, lambda: require_complete(path))
        reason = _damage(path, manifest, process, tell)
        if reason is not None:
            on_main(process, lambda: refuse(path, f"damaged ({reason})"))
        return path, manifest
    store = CheckpointStore(config.output)
    candidates, told = on_main(process, lambda: _by_size(store))
    for line in told:
        tell(line)
    for path, manifest in candidates:
        reason = _damage(path, manifest, process, tell)
        if reason is None:
            return path, manifest
        tell(f"skipping damaged checkpoint {path}: {reason}")
    if process.from_main(bool(store.named())):
        raise UserError(
            f"output={config.output}: none of the checkpoints there can be used; bring one of them back, or remove "
            f"{store.folder} to begin again."
        )
    return None


def _by_size(store: CheckpointStore) -> tuple[list[tuple[Path, Manifest]], list[str]]:
    told = [f"skipping half-written checkpoint {path}: {reason}" for path, reason in store.broken().items()]
    usable = [path for path in reversed(store.named()) if problem(path) is None]
    return [(path, read_manifest(path)) for path in usable], told


def _damage(
    checkpoint: Path, manifest: Manifest, process: Process, tell: Callable[[str], None]
) -> str | None:
    """What is wrong with the files of a checkpoint, or None; each rank reads its share. Collective."""
    start = time.perf_counter()
    found = process.gather_objects(
        damage(checkpoint, manifest.files, share(manifest.files, process.rank, process.world))
    )
    seconds = time.perf_counter() - start
    size = sum(record.bytes for record in manifest.files.values()) / 1e6
    if process.is_main and not manifest.older:
        tell(f"{checkpoint.name}: {size:,.1f} MB checked in {seconds:.1f} s ({size / seconds:,.0f} MB/s)")
    return next((reason for reason in found if reason is not None), None)
