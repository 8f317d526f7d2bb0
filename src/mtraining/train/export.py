"""A checkpoint of any topology as one Hugging Face folder, on one process. Of a low-rank adapter: itself, or merged."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)

from mtraining.errors import UserError
from mtraining.model import ModelOptions, build_model, export_model
from mtraining.model.adapters import open_adapter, trained, without_frozen
from mtraining.model.export import export_whole
from mtraining.model.export_folder import check_target
from mtraining.model.load import cast_parameters, load_tokenizer
from mtraining.train.config import ParallelSection, load_config
from mtraining.train.corpus import data_tokenizer
from mtraining.train.digest import damage
from mtraining.train.frozen import frozen_weights
from mtraining.train.identity import check_shapes, model_changes, model_identity, require_allowed
from mtraining.train.loop import parallel_model
from mtraining.train.mesh import joined_processes
from mtraining.train.policy import Change
from mtraining.train.reader import SafeReader, load
from mtraining.train.store import CheckpointStore, Manifest, refuse, require_complete

DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def export_run(
    run: Path, out: Path, checkpoint: str | None = None, dtype: str | None = None, merge: bool = False
) -> Path:
    """Write `checkpoint` of `run` (`best`, a name in the run folder or a path; default the newest) to `out`; its path.

    Args:
        merge: of a run with `model.lora`, write the whole model with the adapter added to its weights; the adapter
            alone otherwise.

    Raises:
        UserError: no such run, checkpoint or dtype, nothing to merge, an `out` that holds anything but an export, or a
            checkpoint of another model than the run's configuration.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known; use float32 or bfloat16.")
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is not a run folder: it holds no config.yaml; give the output folder of a training run."
        )
    check_target(out)
    config = load_config(run / "config.yaml")
    if merge and not config.model.lora.r:
        raise UserError(f"--merge: {run} trained the whole model, without model.lora; leave --merge out.")
    store = CheckpointStore(run)
    if checkpoint is None:
        source = store.latest()
        if source is None:
            raise UserError(f"{run} has no complete checkpoint to export; train it further first.")
    else:
        source = store.find(checkpoint)
    if merge:
        options = config.model if dtype is None else config.model.model_copy(update={"dtype": dtype})
        hf_model = checkpoint_model(options, config.train.seq_len, source)
        export_whole(hf_model, out, tokenizer=load_tokenizer(options) or data_tokenizer(config))
        return source
    manifest = require_sound(source)
    with joined_processes(config.model_copy(update={"parallel": ParallelSection()})) as process:
        model = parallel_model(config, process)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        frozen = frozen_weights(model, process)
        require_model(shapes, model.hf_model.config, manifest, source, frozen)
        state = {"model": without_frozen(model, get_model_state_dict(model))}
        load(state, SafeReader(str(source)))
        set_model_state_dict(model, state["model"], options=StateDictOptions(strict=not frozen))
        tokenizer = load_tokenizer(config.model) or data_tokenizer(config)
        export_model(model, out, tokenizer=tokenizer, dtype=DTYPES[dtype])
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
    shapes: Mapping[str, list[int]], hf_config: Any, manifest: Manifest, checkpoint: Path, frozen: str
) -> None:
    """Refuse a checkpoint of another model than the one with these parameters, this transformers config and these
    weights that are not trained."""
    check_shapes(shapes, manifest, checkpoint)
    if not manifest.older:
        changes = model_changes(manifest.model, model_identity(hf_config), manifest.step)
        if manifest.frozen != frozen:
            changes.append(
                Change(manifest.step, "model.init", f"weights {manifest.frozen}", f"weights {frozen}")
            )
        require_allowed(changes, checkpoint, ())


def checkpoint_model(options: ModelOptions, seq_len: int, checkpoint: Path) -> Any:
    """The plain transformers model of a checkpoint, whole on this process's CPU; an adapter is added to its weights.

    Args:
        options: how its run built it; the dtype may be another.
        seq_len: its run's tokens in a sequence.

    Raises:
        UserError: a damaged checkpoint, or one of another model.
    """
    model, _ = build_model(options, seq_len)
    hf_model, adapter = open_adapter(model)
    manifest = require_sound(checkpoint)
    # A checkpoint names parameters as the trained model does, which has the transformers model inside.
    shapes = {f"hf_model.{name}": list(parameter.shape) for name, parameter in hf_model.named_parameters()}
    require_model(shapes, hf_model.config, manifest, checkpoint, frozen_weights(hf_model))
    state = {f"hf_model.{name}": parameter for name, parameter in trained(hf_model).items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a process may be alone
        load({"model": state}, SafeReader(str(checkpoint)))
    if adapter is not None:
        hf_model = model.merge_and_unload()
        cast_parameters(hf_model, getattr(torch, options.dtype))
    return hf_model
