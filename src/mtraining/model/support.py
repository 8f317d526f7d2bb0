"""Which Hugging Face models the sparse path can honour, decided from config and modules, never from names.

Everything here runs before the first step: what would be computed wrongly is refused with one sentence.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import MoeModelOutputWithPast

from mtraining.errors import UserError

SUPPORTED_HEAD_DIMS = range(16, 257, 8)
"""Head sizes of the reference kernel; the GPU kernels take a subset and say so themselves."""

STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")

_NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
OLDER_NAMES = {"gpt_neox": _NEOX_NAMES, "gpt_neox_japanese": _NEOX_NAMES}
"""By model type: what configs of before transformers 5 call ``rope_theta`` and ``partial_rotary_factor``, if not so."""

_DROPOUT_FIELDS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
_SOFTCAP = re.compile(r"soft_?cap|logit_cap")
_LOGIT_FACTORS = (
    "logit_scale",
    "logits_scale",
    "logits_scaling",
    "logits_mup_width_multiplier",
    "lm_head_multiplier",
    "output_multiplier",
)


def check_config(config: Any) -> None:
    """Refuse a config whose attention, rotary embedding or logits are not the plain causal kind.

    Args:
        config: a transformers ``PreTrainedConfig`` of a causal language model.

    Raises:
        UserError: names the field at fault and what to do.
    """
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model: {name} is an encoder-decoder (is_encoder_decoder); use a decoder-only causal model."
        )
    if config.get_text_config() is not config:
        raise UserError(
            f"model: {name} wraps a text model (text_config) with other parts; use the text model alone."
        )
    if not getattr(config, "is_causal", True):
        raise UserError(f"model: {name} has is_causal=False; only causal attention is supported.")
    _check_windows(config, name)
    fields = fields_of(config)
    for field, value in fields.items():
        if value and _SOFTCAP.search(field):
            raise UserError(
                f"model: {name} caps its logits ({field}={value}), which sparse attention and the chunked loss do not "
                f"compute; use a model without soft-capping."
            )
    for field in _LOGIT_FACTORS:
        if fields.get(field) not in (None, 1, 1.0):
            raise UserError(
                f"model: {name} scales its logits ({field}={fields[field]}), which the chunked loss does not compute; "
                f"use a model whose logits are lm_head(hidden)."
            )
    for field in _DROPOUT_FIELDS:
        if fields.get(field):
            raise UserError(
                f"model: attention dropout is not supported ({field}={fields[field]}); set {field} to 0."
            )
    if fields.get("output_router_logits"):
        raise UserError(
            "model: output_router_logits=True asks for a router loss that the chunked loss does not add; set "
            "it to False."
        )
    _check_heads(config, name)
    for field in ("v_head_dim", "qk_head_dim"):
        size = fields.get(field)
        if size is not None and size != head_dim_of(config):
            raise UserError(
                f"model: {name} has heads of {field}={size} beside head_dim={head_dim_of(config)}; use a model whose "
                "queries, keys and values share one head_dim."
            )
    check_rope(config)


def fields_of(config: Any) -> dict[str, Any]:
    """Every value that a model can read from its config: fields, their other names, and properties.

    ``to_dict()`` has the fields alone. Some configs compute what a model reads: MiniCPM3's ``logits_scaling`` is a
    property, and a field that is renamed by ``attribute_map`` is found under the other name only.
    """
    names = [*config.to_dict(), *(getattr(config, "attribute_map", None) or ())]
    for kind in type(config).__mro__:
        if kind.__module__.startswith("transformers.models."):
            names += [name for name, value in vars(kind).items() if isinstance(value, property)]
    found = {}
    for name in names:
        try:
            found[name] = getattr(config, name)
        except Exception:  # a property that holds for other variants of the architecture only
            continue
    return found


def check_rope(config: Any) -> None:
    """Refuse rotary settings that are missing, differ by layer, or change with the positions a process happens to see.

    Raises:
        UserError: names the rope type and the remedy.
    """
    parameters = getattr(config, "rope_parameters", None)
    name = config.model_type
    if not parameters:
        raise UserError(
            f"model: {name} has no rotary embedding (rope_parameters); use a model with rotary positions."
        )
    if getattr(config, "max_position_embeddings", None) is None:
        raise UserError(
            f"model: {name} does not say how many positions it knows (max_position_embeddings); use a model that does."
        )
    if "rope_type" not in parameters:
        raise UserError(
            f"model: {name} has different rotary settings by layer type; use a model with one for all layers."
        )
    if parameters.get("mrope_section"):
        raise UserError(
            f"model: {name} has multi-axis rotary positions (mrope_section); use a text-only model."
        )
    rope_type = parameters["rope_type"]
    if rope_type not in STATIC_ROPE_TYPES:
        raise UserError(
            f"model: rope type {rope_type!r} of {name} is not supported, since its frequencies may depend on "
            f"the positions "
            f"each process sees; set model.rope.type to yarn, linear or dynamic (resolved once at the "
            f"training length), "
            f"with model.rope.original_max_position_embeddings."
        )


def _check_windows(config: Any, name: str) -> None:
    layer_types = getattr(config, "layer_types", None)
    for layer_type in layer_types or ():
        if layer_type != "full_attention":
            kind = {"sliding_attention": "sliding window", "chunked_attention": "chunked"}.get(
                layer_type, layer_type
            )
            raise UserError(
                f"model: {name} has {kind} attention (layer_types contains {layer_type!r}), which the sparse "
                f"path does "
                f"not honour; use a model with full attention in every layer."
            )
    window = getattr(config, "sliding_window", None)
    if window is not None and not layer_types and getattr(config, "use_sliding_window", True):
        raise UserError(
            f"model: {name} has sliding window attention (sliding_window={window}), which the sparse path does not "
            f"honour; use a model with sliding_window null."
        )
    if getattr(config, "attention_chunk_size", None):
        raise UserError(
            f"model: {name} has chunked attention (attention_chunk_size={config.attention_chunk_size}), which the "
            f"sparse path does not honour; use a model with full attention in every layer."
        )


def head_dim_of(config: Any) -> int:
    """Size of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_heads(config: Any, name: str) -> None:
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise UserError(
            f"model: the config of {name} has no num_attention_heads; use a causal language model of the Llama kind."
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise UserError(
            f"model: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}; choose kv "
            f"heads that do."
        )
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise UserError(
            f"model: num_attention_heads={heads} does not divide hidden_size={config.hidden_size}; choose "
            f"heads that do, "
            f"or set head_dim."
        )
    if head_dim_of(config) not in SUPPORTED_HEAD_DIMS:
        raise UserError(
            f"model: {name} has head_dim={head_dim_of(config)}, which is not supported; use a multiple of "
            f"{SUPPORTED_HEAD_DIMS.step} from {SUPPORTED_HEAD_DIMS.start} to {SUPPORTED_HEAD_DIMS.stop - 1}."
        )


def decoder_of(hf_model: Any) -> Any:
    """The base decoder (embeddings, layers, final norm, rotary embedding) inside a causal language model."""
    return hf_model.get_decoder() if hasattr(hf_model, "get_decoder") else None


def check_supported(hf_model: Any) -> None:
    """Refuse a model that the sparse path or the chunked loss would compute wrongly.

    Args:
        hf_model: a transformers causal language model, on any device (meta included), before any wrapping.

    Raises:
        UserError: names what is at fault and what to do.
    """
    check_config(hf_model.config)
    name = hf_model.config.model_type
    decoder = decoder_of(hf_model)
    head = hf_model.get_output_embeddings() if hasattr(hf_model, "get_output_embeddings") else None
    if (
        decoder is None
        or decoder is hf_model
        or not isinstance(getattr(decoder, "layers", None), nn.ModuleList)
    ):
        raise UserError(
            f"model: {name} has no base decoder with `layers`; use a causal language model of the Llama kind."
        )
    if not isinstance(getattr(decoder, "rotary_emb", None), nn.Module):
        raise UserError(
            f"model: {name} has no rotary embedding (rotary_emb); use a model with rotary positions."
        )
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"model: {name} has no linear lm_head; use a causal language model (AutoModelForCausalLM)."
        )
    if head.bias is not None:
        raise UserError(
            f"model: {name} has a bias on its lm_head, which the chunked loss does not add; use another model."
        )
    # Off the attention interface, a layer would go on computing its own dense attention.
    if not getattr(hf_model, "_supports_attention_backend", False):
        raise UserError(
            f"model: {name} does not use transformers' attention interface; use a model that does."
        )
    _check_partial_rotary(hf_model)
    _check_logits(hf_model)
    told = head_dim_of(hf_model.config)
    for index, attention in attention_modules(hf_model):
        for field in _DROPOUT_FIELDS:
            rate = getattr(attention, field, None)
            if isinstance(rate, float) and rate > 0:
                raise UserError(
                    f"model: layer {index} of {name} has attention dropout ({field}={rate}), which is not supported; "
                    "set it to 0."
                )
        own = getattr(attention, "head_dim", None) or told
        if own != told:
            raise UserError(
                f"model: layer {index} of {name} has heads of size {own} where its config says head_dim={told}; "
                f"correct model.config."
            )


def _check_partial_rotary(hf_model: Any) -> None:
    """Refuse ``partial_rotary_factor`` where the model's own code does not read it: part of a head would be rotated by
    frequencies of another size, or all of it in silence."""
    config, rotary = hf_model.config, decoder_of(hf_model).rotary_emb
    partial = config.rope_parameters.get("partial_rotary_factor")
    if partial in (None, 1, 1.0) or not hasattr(rotary, "inv_freq"):
        return
    # Scaled types share one function, which reads it for all models; the plain type is each model's own code.
    plain = copy.deepcopy(config)
    theta = config.rope_parameters["rope_theta"]
    plain.rope_parameters = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": partial}
    pairs = type(rotary)(plain).inv_freq.shape[-1]
    if pairs != (int(head_dim_of(config) * partial) + 1) // 2:
        raise UserError(
            f"model: {config.model_type} does not take partial_rotary_factor={partial}, and rotates whole heads; "
            "remove it, or use a model that does."
        )


@torch.no_grad()
def _check_logits(hf_model: Any) -> None:
    """Refuse a model whose logits are not ``lm_head(hidden)``, whatever its config calls what it does with them.

    Asked of the model itself, with two random hidden states in place of its decoder's. On the meta device there are no
    numbers to compare, and the fields of the config must do.
    """
    decoder, head = decoder_of(hf_model), hf_model.get_output_embeddings()
    weight = head.weight
    if weight.is_meta or isinstance(weight, DTensor):
        return
    hidden = torch.linspace(-2, 2, 2 * weight.shape[1], device=weight.device).view(1, 2, -1).to(weight.dtype)
    hidden = hidden.roll(1, -1)

    def decode(*_: Any, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=hidden)

    own = vars(decoder).get("forward")
    decoder.forward = decode
    try:
        logits = hf_model(torch.zeros(1, 2, dtype=torch.long, device=weight.device), use_cache=False).logits
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
    expected = head(hidden).float()
    same = logits.shape == expected.shape and torch.allclose(logits.float(), expected, rtol=1e-3, atol=1e-6)
    if not same:
        raise UserError(
            f"model: the logits of {hf_model.config.model_type} are not lm_head(hidden): its own code scales, caps or "
            "shifts them, which the chunked loss does not compute; use a model without that."
        )


def attention_modules(hf_model: Any) -> Iterator[tuple[int, nn.Module]]:
    """(layer index, its self-attention module) for each decoder layer.

    Raises:
        UserError: a layer has not exactly one attention, or one that is not plain causal softmax attention.
    """
    name = hf_model.config.model_type
    for index, layer in enumerate(decoder_of(hf_model).layers):
        # Every attention that goes through the interface tells it whether it is causal by this attribute.
        found = [module for module in layer.modules() if hasattr(module, "is_causal")]
        if len(found) != 1:
            raise UserError(
                f"model: layer {index} of {name} has {len(found)} attention modules; use a model with one causal "
                f"self-attention in each layer."
            )
        attention = found[0]
        if not attention.is_causal:
            raise UserError(
                f"model: layer {index} of {name} has is_causal=False; only causal attention is supported."
            )
        if any(parameter_name == "sinks" for parameter_name, _ in attention.named_parameters()):
            raise UserError(
                f"model: layer {index} of {name} has learned attention sinks (sinks), which the sparse path does not "
                f"compute; use a model without them."
            )
        yield index, attention
