"""A checkpoint of any topology as one Hugging Face folder, on one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from mtraining.errors import UserError
from mtraining.model import export_model
from mtraining.model.export_folder import check_target
from mtraining.train.config import ParallelSection, load_config
from mtraining.train.corpus import data_tokenizer
from mtraining.train.digest import damage
from mtraining.train.identity import check_shapes, model_changes, model_identity, require_allowed
from mtraining.train.loop import parallel_model
from mtraining.train.mesh import joined_processes
from mtraining.train.reader import SafeReader, load
from mtraining.train.store import CheckpointStore, Manifest, refuse, require_complete

DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def export_run(run: Path, out: Path, checkpoint: str | None = None, dtype: str | None = None) -> Path:
    """Write `checkpoint` of `run` (`best`, a name in the run folder or a path; default the newest) to `out`; its path.

    Raises:
        UserError: no such run, checkpoint or dtype, an `out` that holds anything but an export, or a checkpoint of
            another model than the run's configuration.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known; use float32 or bfloat16.")
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is not a run folder: it holds no config.yaml; give the output folder of a training run."
        )
    check_target(out)
    config = load_config(run / "config.yaml")
    store = CheckpointStore(run)
    if checkpoint is None:
        source = store.latest()
        if source is None:
            raise UserError(f"{run} has no complete checkpoint to export; train it further first.")
    else:
        source = store.find(checkpoint)
    manifest = require_sound(source)
    with joined_processes(config.model_copy(update={"parallel": ParallelSection()})) as process:
        model, tokenizer = parallel_model(config, process)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        require_model(shapes, model.hf_model.config, manifest, source)
        state = {"model": get_model_state_dict(model)}
        load(state, SafeReader(str(source)))
        set_model_state_dict(model, state["model"])
        export_model(model, out, tokenizer=tokenizer or data_tokenizer(config), dtype=DTYPES[dtype])
    return source


def require_sound(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint that is complete, and whose files are what was written.

    Raises:
        UserError: naming the file at fault.
    """
    manifest = require_complete(checkpoint)
    reason = damage(checkpoint, manifest.files, list(manifest.files))
    if reason is not None:
        refuse(checkpoint, f"damaged ({reason})")
    return manifest


def require_model(
    shapes: Mapping[str, list[int]], hf_config: Any, manifest: Manifest, checkpoint: Path
) -> None:
    """Refuse a checkpoint of another model than the one with these parameters and this transformers config."""
    check_shapes(shapes, manifest, checkpoint)
    if not manifest.older:
        changes = model_changes(manifest.model, model_identity(hf_config), manifest.step)
        require_allowed(changes, checkpoint, ())
