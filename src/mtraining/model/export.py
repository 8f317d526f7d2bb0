"""Write a trained model as an ordinary Hugging Face folder: safetensors, config with the extended rope, tokenizer."""

from __future__ import annotations

import copy
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mtraining.errors import UserError
from mtraining.model.parallel import ParallelLM


def export_model(
    model: ParallelLM, folder: str | Path, tokenizer: Any = None, dtype: torch.dtype | None = None
) -> None:
    """Gather the full weights and write them where plain ``AutoModelForCausalLM.from_pretrained`` loads them.

    Collective over the model's ranks. The first rank writes to a temporary folder beside ``folder`` and renames it, so
    that a half-written export is never found under its name; the other ranks wait for it.

    Args:
        model: from `parallelize`.
        folder: where to write; an earlier export there is replaced, anything else is refused.
        tokenizer: saved beside the model when given.
        dtype: dtype of the saved weights; None keeps the parameters' own.

    Raises:
        UserError: ``folder`` exists and is not an exported model.
    """
    target = Path(folder)
    if (
        target.exists()
        and not (target / "config.json").exists()
        and (not target.is_dir() or any(target.iterdir()))
    ):
        raise UserError(
            f"export: {target} exists and holds no exported model; choose another folder or remove it."
        )
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model.hf_model, options=options)  # on rank 0 only, when there are others
    mesh = model.fsdp_mesh
    failure: list[str | None] = [None]
    if mesh is None or mesh.get_local_rank() == 0:
        try:
            _write(model.hf_model, state, target, tokenizer, dtype)
        except (OSError, SafetensorError) as error:
            failure = [f"export: writing {target} failed ({error}); free space or choose another folder."]
    if mesh is not None:
        group = mesh.get_group()
        dist.broadcast_object_list(failure, src=dist.get_global_rank(group, 0), group=group)
    if failure[0] is not None:
        raise UserError(failure[0])


def _write(
    hf_model: Any, state: dict[str, Any], target: Path, tokenizer: Any, dtype: torch.dtype | None
) -> None:
    """Write the folder under a temporary name, then put it in place of ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    try:
        hf_model.save_pretrained(temporary, state_dict=state)
        config = copy.deepcopy(hf_model.config)
        config.dtype = dtype or hf_model.dtype
        config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
