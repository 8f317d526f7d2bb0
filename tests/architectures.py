"""Every causal architecture of the installed transformers, small: its config, its model, and whether it is accepted."""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mtraining.errors import UserError
from mtraining.model import check_supported, fix_rope
from mtraining.model.support import check_config
from mtraining.model.windows import check_windows

VOCAB, SEQ_LEN, LAYERS, WINDOW = 64, 64, 2, 16
NAMES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes, under the names that most configs have; a config is given those that it knows."""

SIZES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {"d_model": 32, "n_heads": 2, "n_layers": LAYERS, "max_seq_len": 128,
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 0},
    "dots1": {"n_shared_experts": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB,
                     "hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": LAYERS},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
                          "image_size": 28, "crop_size": 28},
        "audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 1,
                         "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16}},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "xlnet": {"d_model": 32, "n_head": 2, "d_head": 16},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""Sizes of single architectures: fields that `SMALL` does not name, or that must fit each other."""

_REMEDIES: tuple[tuple[str, Callable[[re.Match[str], str], dict[str, Any]]], ...] = (
    (
        r"\(layer_types contains 'conv'\)",
        lambda found, name: _every_layer_full(name),
    ),
    # Granite 4 comes in both kinds.
    (
        r"granitemoehybrid .*\(layer_types contains 'linear_attention'\)",
        lambda found, name: _every_layer_full(name),
    ),
    (r"attention dropout.*; set (\w+) to 0", lambda found, name: {found[1]: 0.0}),
    (r"caps its attention scores \((\w+)=", lambda found, name: {found[1]: None}),
)
"""What a refusal says, and the settings that mend it: another configuration of the same architecture."""

Kind = Literal["yes", "set", "no"]


@dataclass(frozen=True)
class Verdict:
    """Whether an architecture is accepted.

    Attributes:
        kind: ``yes`` as its config comes, ``set`` with other settings, ``no``.
        settings: those of ``set``.
        reason: why its config is refused as it comes; empty for ``yes``.
    """

    kind: Kind
    settings: Mapping[str, Any]
    reason: str


def known_fields(name: str) -> set[str]:
    """Fields of the config of an architecture, by all their names."""
    kind = CONFIG_MAPPING[name]
    found = {*(getattr(kind, "attribute_map", None) or ())}
    for one in kind.__mro__:
        found |= set(getattr(one, "__annotations__", {}))
    return found


@functools.cache
def default_config(name: str) -> Any:
    """Its config as it comes; None for an architecture without a default."""
    try:
        with quiet():
            return CONFIG_MAPPING[name]()
    except Exception:
        return None


def small_config(name: str, **settings: Any) -> Any:
    """A config of the sizes above, and all else as it comes, but for ``settings``.

    Windows and chunks are shorter than the sequence, so that one which nobody honours would show. Where a config has
    layers of several kinds, every second layer has full attention.
    """
    known = known_fields(name)
    fields = {field: value for field, value in SMALL.items() if field in known}
    for field in ("sliding_window", "attention_chunk_size"):
        if getattr(default_config(name), field, None) is not None:
            fields[field] = WINDOW
    kinds = set(getattr(default_config(name), "layer_types", None) or ())
    bounded = kinds & {"sliding_attention", "chunked_attention"}
    if bounded and kinds <= bounded | {"full_attention"}:
        layers = SIZES.get(name, {}).get("num_hidden_layers", LAYERS)
        fields["layer_types"] = [[*bounded, "full_attention"][layer % 2] for layer in range(layers)]
    with quiet():
        config = AutoConfig.for_model(name, **{**fields, **SIZES.get(name, {}), **settings})
    return config


def small_model(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A random model of it, in evaluation mode, the same for every call."""
    config = small_config(name, **settings)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.data = parameter.data.to(dtype)
                # The usual small initial weights give nearly uniform attention, where a wrong mask hardly shows.
                if re.search(r"(q_proj|k_proj|qkv|query|c_attn|kv_proj|Wqkv)\w*\.weight", parameter_name):
                    parameter.mul_(6)
                elif re.search(r"sinks|bias", parameter_name):
                    parameter.add_(torch.randn_like(parameter) * 0.5)
    fix_rope(model, SEQ_LEN)
    return model.eval()


def _every_layer_full(name: str) -> dict[str, Any]:
    return {"layer_types": ["full_attention"] * SIZES.get(name, SMALL).get("num_hidden_layers", LAYERS)}


@functools.cache
def verdict(name: str) -> Verdict:
    """Asked of its config as it comes, and then with settings for which its refusals ask."""
    settings: dict[str, Any] = {}
    first = reason = _refusal(name, settings) or _refusal_by_default(name)
    while reason is not None:
        mended = [make(found, name) for pattern, make in _REMEDIES if (found := re.search(pattern, reason))]
        if not mended or mended[0].items() <= settings.items():
            return Verdict("no", {}, first or "")
        settings |= mended[0]
        reason = _refusal(name, settings)
    return Verdict("set" if settings else "yes", settings, first or "")


def _refusal_by_default(name: str) -> str | None:
    """Of the config as it comes in its own size: two layers may hide of what kinds the others are."""
    config = default_config(name)
    if config is None:
        return None
    try:
        check_windows(config)
    except UserError as error:
        return str(error)
    return None


def _refusal(name: str, settings: Mapping[str, Any]) -> str | None:
    """The sentence that refuses a small one, None where it is accepted."""
    try:
        with quiet():
            config = small_config(name, **settings)
            check_config(config)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            fix_rope(model, SEQ_LEN)
            check_supported(model)
            # Its logits can be asked of numbers only.
            check_supported(small_model(name, **settings))
    except UserError as error:
        return str(error)
    except (ValueError, StrictDataclassError) as error:
        return f"transformers cannot build a small one: {' '.join(str(error).split())}"
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of small configs."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(level)
