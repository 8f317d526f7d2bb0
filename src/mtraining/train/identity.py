"""Who the model and the data of a checkpoint are: by what they compute and hold, not by where they lie.

The model is its transformers config, as it was built (rotary settings included), and the names and shapes of its
parameters. The data are the prepared documents and tokens, wherever the folder is and however it is cut into shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtraining.errors import UserError
from mtraining.train.config import Config
from mtraining.train.policy import Change, allowed, check_steps, option_changes, policy
from mtraining.train.store import Manifest

# Fields of a transformers config that do not change what a training step computes.
NO_PART = {
    "_attn_implementation", "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
VERSION = "transformers_version"
ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")


def model_identity(hf_config: Any) -> dict[str, Any]:
    """The fields of a transformers config as values of JSON, and the version of transformers that read them."""
    fields = json.loads(json.dumps(hf_config.to_dict(), default=str))
    kept = {name: value for name, value in fields.items() if name not in NO_PART}
    return kept | {VERSION: fields.get(VERSION)}


def model_changes(then: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[Change]:
    """How two models differ, but for shapes. A field that only one of them has counts where both were read by the same
    version of transformers: versions add fields and drop them."""
    same = then.get(VERSION) == now.get(VERSION)
    names = [name for name in ({**then, **now} if same else then.keys() & now.keys()) if name != VERSION]
    changes = []
    for name in sorted(names):
        section = "model.rope" if name in ROPE else "model.config"
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            place = section if name.startswith("rope") else f"{section}.{name}"
            for part in sorted(old.keys() | new.keys()):
                if old.get(part) != new.get(part):
                    changes.append(Change(step, f"{place}.{part}", old.get(part), new.get(part)))
        elif old != new:
            changes.append(Change(step, f"{section}.{name}", old, new))
    return changes


def check_options(config: Config, checkpoint: Path, manifest: Manifest) -> list[Change]:
    """What of the configuration is not as the checkpoint has it. Needs neither processes nor a model.

    Raises:
        UserError: fewer steps than are done; an option whose change is refused, by name, with both values.
    """
    check_steps(config, checkpoint, manifest.step)
    changes = option_changes(config, manifest.options, manifest.step)
    require_allowed(changes, checkpoint, config.checkpoint.allow)
    return changes


def require_allowed(changes: list[Change], checkpoint: Path, allow: tuple[str, ...]) -> None:
    """Refuse the changes that are neither told only nor named in `checkpoint.allow`, all in one sentence."""
    refused = [
        change for change in changes if _is_refused(change.option) and not allowed(change.option, allow)
    ]
    if not refused:
        return
    names = sorted({_allow_name(change.option) for change in refused})
    raise UserError(
        f"checkpoint {checkpoint} is of another run: {'; '.join(map(str, refused))}; restore what it was, use another "
        f"output folder, or set checkpoint.allow=[{', '.join(names)}] to go on with the change."
    )


def _is_refused(option: str) -> bool:
    return option.startswith(("model.rope.", "model.config.")) or policy(option).rule in (
        "refused",
        "content",
    )


def _allow_name(option: str) -> str:
    return "model.rope" if option.startswith("model.rope.") else option


def check_shapes(here: Mapping[str, list[int]], manifest: Manifest, checkpoint: Path) -> None:
    """Refuse a checkpoint whose parameters are not this model's by name and shape (name -> shape on both sides)."""
    there = manifest.shapes
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) == there.get(name):
            continue
        sizes = [
            f"has shape {tuple(shapes[name])}" if name in shapes else "is absent" for shapes in (there, here)
        ]
        raise UserError(
            f"checkpoint {checkpoint} is of another model: {name} {sizes[0]} there and {sizes[1]} here; use the "
            "configuration it was trained with, or another output folder."
        )
