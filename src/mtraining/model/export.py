"""Write a trained model as an ordinary Hugging Face folder: safetensors, config with the extended rope, tokenizer.

Of a model with a low-rank adapter the folder holds the adapter, as peft reads it, beside the same config and tokenizer.
"""

from __future__ import annotations

import copy
import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from mtraining.errors import UserError
from mtraining.model.adapters import Adapter, trained
from mtraining.model.export_folder import CONFIG, check_target, put_in_place
from mtraining.model.parallel import ParallelLM
from mtraining.model.support import OLDER_NAMES, ropes_of


def export_model(
    model: ParallelLM, folder: str | Path, tokenizer: Any = None, dtype: torch.dtype | None = None
) -> None:
    """Gather the full weights and write them where plain ``AutoModelForCausalLM.from_pretrained`` loads them.

    With an adapter only what was trained is gathered, and ``peft.PeftModel.from_pretrained`` loads it.

    Collective over the model's ranks. The first rank writes to a temporary folder beside ``folder`` and moves it there
    when it is whole. So a half-written export is never found under its name. The other ranks wait for the first.

    Args:
        model: from `parallelize`.
        folder: where to write: a new or empty folder, or one of an earlier export, whose files are replaced while
            files that were put beside them stay.
        tokenizer: saved beside the model when given.
        dtype: dtype of the saved weights; None keeps the parameters' own.

    Raises:
        UserError: ``folder`` holds something else; writing failed.
    """
    target = Path(folder).resolve()
    mesh = model.fsdp_mesh
    main = mesh is None or mesh.get_local_rank() == 0
    problem: str | None = None
    if main:  # alone, since other machines may not see the folder
        try:
            check_target(target)
        except UserError as error:
            problem = str(error)
    _agree(problem, mesh)
    state = whole_state(model)
    if main:
        try:
            _write(model.hf_model, state, target, tokenizer, dtype, model.adapter)
        except UserError as error:
            problem = str(error)
    _agree(problem, mesh)


def whole_state(model: ParallelLM) -> dict[str, Any]:
    """The weights, whole, by their names in the transformers model; with an adapter, what is trained.

    On the first rank only, when there are others. Collective.
    """
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=model.adapter is not None
    )
    return get_model_state_dict(model.hf_model, options=options)


def export_whole(
    hf_model: Any, folder: str | Path, tokenizer: Any = None, dtype: torch.dtype | None = None
) -> None:
    """The same of a transformers model that is whole on this process."""
    target = Path(folder).resolve()
    check_target(target)
    _write(hf_model, hf_model.state_dict(), target, tokenizer, dtype)


def _agree(problem: str | None, mesh: Any) -> None:
    """Raise the first rank's problem, if it has one, on every rank. Collective."""
    box = [problem]
    if mesh is not None:
        group = mesh.get_group()
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    if box[0] is not None:
        raise UserError(box[0])


def _write(
    hf_model: Any,
    state: dict[str, Any],
    target: Path,
    tokenizer: Any,
    dtype: torch.dtype | None,
    adapter: Adapter | None = None,
) -> None:
    """Write the folder under a temporary name, then put it in place; `UserError` where writing fails."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if adapter is not None:
            adapter.save({name: state[name] for name in trained(hf_model, tied=True)}, temporary)
        else:
            hf_model.save_pretrained(temporary, state_dict=state)
        config = copy.deepcopy(hf_model.config)
        # An adapter's folder says what the weights under it were; what is trained may be finer.
        config.dtype = dtype or (hf_model.dtype if adapter is None else config.dtype)
        config.save_pretrained(temporary)
        _add_older_keys(temporary / CONFIG, config)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
            _name_older_class(temporary / "tokenizer_config.json")
        put_in_place(temporary, target)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"export: writing {target} failed ({error}); free space or choose another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _add_older_keys(path: Path, config: Any) -> None:
    """Write the rotary settings under the names of transformers 4 too: a reader that knows only those would take theta
    10,000 without scaling, and say nothing. transformers 5 reads the same from either."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps({**fields, **older_keys(config)}, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def older_keys(config: Any) -> dict[str, Any]:
    """The rotary settings of a config as transformers 4 names them: a theta, and a scaling (None without one).

    Empty for a model without rotary settings, and for one whose settings differ by layer type.
    """
    ropes = ropes_of(config)
    if None not in ropes:
        return {}
    parameters = dict(ropes[None])
    theirs = OLDER_NAMES.get(config.model_type, {})
    keys = {
        theirs.get(name, name): parameters.pop(name)
        for name in ("rope_theta", "partial_rotary_factor")
        if name in parameters
    }
    return {
        **keys,
        "rope_scaling": None if parameters.get("rope_type", "default") == "default" else parameters,
    }


def _name_older_class(path: Path) -> None:
    """Name the general tokenizer by its name of before transformers 5, which both know: older ones refuse the new."""
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
