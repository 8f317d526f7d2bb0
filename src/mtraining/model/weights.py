"""Read the weights of a model, and refuse whatever is not the whole model: by name, in one sentence.

transformers draws at random what a checkpoint lacks and leaves aside what it has too much, with a warning. A run would
then train from half-random weights.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mtraining.errors import UserError, first_line
from mtraining.inputs.hub import quiet

logger = logging.getLogger(__name__)

UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError)
"""What reading a damaged file of weights raises: safetensors, torch and transformers have their own kinds each."""


def load_weights(init: str, config: Any, dtype: torch.dtype, prefix: str, options: Mapping[str, Any]) -> Any:
    """The model of ``config`` with the weights of ``init``, every tensor of it, in training mode.

    Args:
        init: a folder, or a hub id.
        config: a transformers config, which may differ from the one in ``init`` in its rotary settings.
        dtype: of the parameters.
        prefix: what the names of all tensors begin with in ``init`` and not in the model; usually empty.
        options: further options of ``from_pretrained``.

    Raises:
        UserError: quantized weights; files that are absent or damaged; a tensor that is missing, of another shape, or
            unknown to the model.
    """
    check_not_quantized(init, config)
    # Otherwise a tensor of another shape is an error of its own, without a name.
    options = {"ignore_mismatched_sizes": True, "trust_remote_code": False, **options}
    if prefix:
        options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
    try:
        with quiet(), _quiet_transformers():
            model, found = AutoModelForCausalLM.from_pretrained(
                init, config=config, dtype=dtype, output_loading_info=True, **options
            )
    except (*UNREADABLE, StrictDataclassError, ImportError) as error:
        raise UserError(_unreadable(init, error)) from error
    refuse_incomplete(init, found)
    settle_tied(model)
    return model.train()


def check_not_quantized(init: str, config: Any) -> None:
    """Refuse weights that are stored in a quantized form, which cannot be trained."""
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else type(quantized).__name__
        raise UserError(
            f"model.init={init!r} holds quantized weights (quantization_config: {method}), which cannot be trained; "
            "give the model's unquantized weights."
        )


def refuse_incomplete(init: str, found: Mapping[str, Any]) -> None:
    """Refuse by name what ``from_pretrained`` filled with random numbers or left aside.

    Args:
        found: its loading info. Tensors that a model can do without (a tied head, rotary frequencies of older
            transformers) are not in it.
    """
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    prefix = _common_prefix(missing, unexpected)
    if prefix:
        raise UserError(
            f"model.init={init!r}: the names of its tensors begin with {prefix!r} ({unexpected[0]}), which the model's "
            f"do not; set model.weights_prefix={prefix} to leave that away, or save the model without its wrapper."
        )
    for key, there, here in sorted(found["mismatched_keys"]):
        raise UserError(
            f"model.init={init!r}: {key} has shape {tuple(there)} where its config.json asks for {tuple(here)}; "
            "give weights and config of one model."
        )
    if missing:
        raise UserError(
            f"model.init={init!r} lacks {_named(missing)} of the model that its config.json describes"
            f"{_beside(unexpected)}; give a folder with all weights"
            f"{_tied_hint(missing)}."
        )
    if unexpected:
        raise UserError(
            f"model.init={init!r} holds {_named(unexpected)}, which the model that its config.json describes does not "
            "have; correct config.json, or save the model anew."
        )


def settle_tied(hf_model: Any) -> None:
    """Make ``config.tie_word_embeddings`` say what the model does, since an export writes both.

    A config may tie the head to the embeddings though the checkpoint has a tensor for each, and they differ.
    transformers then keeps both. So does this package, and says so, since either file may be the mistaken one.
    """
    head = hf_model.get_output_embeddings()
    if head is None or not getattr(hf_model.config, "tie_word_embeddings", False):
        return
    if head.weight is hf_model.get_input_embeddings().weight:
        return
    hf_model.config.tie_word_embeddings = False
    logger.warning(
        "model: its config ties lm_head to the input embeddings, but it has a tensor of its own for each, and they "
        "differ: both are kept and trained, and an export says tie_word_embeddings=false."
    )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its tables of keys: what they report is one sentence here."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _common_prefix(missing: list[str], unexpected: list[str]) -> str:
    """What stands before every missing name among the unexpected ones, such as ``base_model.model.``; or nothing."""
    if not missing or not unexpected:
        return ""
    for key in unexpected:
        name = max((name for name in missing if key.endswith(f".{name}")), key=len, default=None)
        if name is None:
            continue
        prefix = key.removesuffix(name)
        if all(other.startswith(prefix) for other in unexpected):
            return prefix
    return ""


def _named(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return (
        f"the tensor {shown}"
        if len(keys) == 1
        else f"{len(keys)} tensors ({shown}{', ...' * (len(keys) > 3)})"
    )


def _beside(unexpected: list[str]) -> str:
    return f", and holds {_named(unexpected)} that it does not have" if unexpected else ""


def _tied_hint(missing: list[str]) -> str:
    if missing == ["lm_head.weight"]:
        return ", or say tie_word_embeddings=true in config.json if the head is the embeddings"
    return ""


def _unreadable(init: str, error: BaseException) -> str:
    reason = said(error)
    folder = Path(init)
    if not folder.is_dir():
        return (
            f"model.init={init!r} cannot be loaded ({reason}); check the id and its files, or give a folder."
        )
    for index in sorted(folder.glob("*.index.json")):
        absent = _absent_shards(index)
        if absent:
            return (
                f"model.init={init!r}: {absent[0]} is missing, one of the files that {index.name} names; copy all of "
                "them."
            )
    damaged = _damaged(folder)
    if damaged:
        return (
            f"model.init={init!r}: {damaged} is damaged or cut short ({reason}); copy or download it again."
        )
    if (folder / "adapter_config.json").exists():
        return (
            f"model.init={init!r} holds an adapter and not a whole model; merge it into its base model first (peft's "
            "merge_and_unload), and give that folder."
        )
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return f"model.init={init!r} holds no weights (model.safetensors); give a folder with the model's weights."
    return f"model.init={init!r} cannot be loaded ({reason}); save the model anew, or give another."


def _absent_shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
    return sorted(name for name in names if not (index.parent / name).exists())


def _damaged(folder: Path) -> str:
    """The first file of weights that cannot be opened."""

    def open_safetensors(path: Path) -> None:
        with safe_open(path, framework="pt"):
            pass

    def open_torch(path: Path) -> None:
        torch.load(path, map_location="meta", weights_only=True)

    kinds: dict[str, Callable[[Path], None]] = {"*.safetensors": open_safetensors, "*.bin": open_torch}
    for pattern, open_file in kinds.items():
        for path in sorted(folder.glob(pattern)):
            try:
                open_file(path)
            except UNREADABLE:
                return path.name
    return ""


def said(error: BaseException) -> str:
    """What transformers says, in one line; for a field of a config that is in the error behind."""
    behind = error.__cause__ if isinstance(error, StrictDataclassError) else None
    return first_line(behind or error).rstrip(".")
