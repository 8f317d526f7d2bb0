"""Which Hugging Face models the sparse path can honour, decided from config and modules, never from names.

Everything here runs before the first step: what would be computed wrongly is refused with one sentence.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mtraining.errors import UserError
from mtraining.model.logits import CAPS, DIVISORS, FACTORS, Head, LogitForm
from mtraining.model.windows import check_asked, check_windows, windows_of

SUPPORTED_HEAD_DIMS = range(16, 257, 8)
"""Head sizes of the reference kernel; the GPU kernels take a subset and say so themselves."""

STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3", "proportional")
"""Types whose frequencies are the same for every forward."""
LENGTH_ROPE_TYPES = ("longrope", "dynamic")
"""Types that take their frequencies from the length of the sequence; `mtraining.model.fix_rope` gives them one."""

_NEOX_NAMES = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
OLDER_NAMES = {"gpt_neox": _NEOX_NAMES, "gpt_neox_japanese": _NEOX_NAMES}
"""By model type: what configs of before transformers 5 call ``rope_theta`` and ``partial_rotary_factor``, if not so."""

_DROPOUT_FIELDS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
# Caps of gates and routers are the model's own code.
_SOFTCAP = re.compile(r"^softcap$|att\w*(soft_?cap|logit_cap)")
_LAYERS = ("layers", "h", "blocks")
"""What decoders call the list of their layers."""


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
    check_windows(config)
    fields = fields_of(config)
    for field, value in fields.items():
        if value and _SOFTCAP.search(field):
            raise UserError(
                f"model: {name} caps its attention scores ({field}={value}), which sparse attention does not compute; "
                f"use a model without soft-capping in attention."
            )
    if fields.get("alibi"):
        raise UserError(
            f"model: {name} adds a bias by distance to its attention scores (alibi), which sparse attention does not "
            "compute; use a model with rotary or learned positions."
        )
    if fields.get("reorder_and_upcast_attn"):
        raise UserError(
            f"model: {name} has attention of its own in fp32 (reorder_and_upcast_attn); set it to False, since sparse "
            "attention sums in fp32 anyway."
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
            latent = " (multi-head latent attention)" if fields.get("kv_lora_rank") else ""
            raise UserError(
                f"model: {name} has heads of {field}={size} beside head_dim={head_dim_of(config)}{latent}; use a model "
                "whose queries, keys and values share one head_dim."
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


def ropes_of(config: Any) -> dict[str | None, dict[str, Any]]:
    """The rotary settings by layer type, or one for all under None; empty for a model without."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return {}
    if "rope_type" in parameters or "rope_theta" in parameters:
        return {None: parameters}
    return {kind: one for kind, one in parameters.items() if isinstance(one, dict)}


def check_rope(config: Any) -> None:
    """Refuse positions that are not text's own, and rotary settings that are not known.

    Raises:
        UserError: names the rope type and the remedy.
    """
    name = config.model_type
    if getattr(config, "max_position_embeddings", None) is None:
        raise UserError(
            f"model: {name} does not say how many positions it knows (max_position_embeddings); use a model that does."
        )
    for parameters in ropes_of(config).values():
        if parameters.get("mrope_section"):
            raise UserError(
                f"model: {name} has multi-axis rotary positions (mrope_section); use a text-only model."
            )
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in STATIC_ROPE_TYPES + LENGTH_ROPE_TYPES:
            raise UserError(
                f"model: rope type {rope_type!r} of {name} is not known; set model.rope.type to yarn, linear or "
                "dynamic, with model.rope.original_max_position_embeddings."
            )


def head_dim_of(config: Any) -> int:
    """Size of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_heads(config: Any, name: str) -> None:
    for field in ("head_dim", "num_attention_heads", "num_key_value_heads"):
        if field in (getattr(config, "per_layer_attributes", None) or ()):
            raise UserError(
                f"model: {name} has another {field} in some layers; use a model whose layers share one."
            )
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
    """The base decoder (embeddings, layers, final norm, rotary embedding) inside a causal language model.

    transformers finds it by name, and sometimes finds the head or the model itself.
    """
    found = hf_model.get_decoder() if hasattr(hf_model, "get_decoder") else None
    for decoder in (found, getattr(hf_model, "model", None)):
        if decoder is not hf_model and _layer_list(decoder) is not None:
            return decoder
    return found


def _layer_list(decoder: Any) -> nn.ModuleList | None:
    lists = (getattr(decoder, name, None) for name in _LAYERS)
    return next((layers for layers in lists if isinstance(layers, nn.ModuleList)), None)


def layers_of(hf_model: Any) -> nn.ModuleList:
    """The decoder's layers.

    Raises:
        UserError: it has none.
    """
    layers = _layer_list(decoder_of(hf_model))
    if layers is not None and decoder_of(hf_model) is not hf_model:
        return layers
    raise UserError(
        f"model: {hf_model.config.model_type} has no base decoder with `layers`; use a causal language model of the "
        "Llama kind."
    )


def check_supported(hf_model: Any) -> None:
    """Refuse a model that the sparse path or the chunked loss would compute wrongly.

    Args:
        hf_model: a transformers causal language model, on any device (meta included), before any wrapping.

    Raises:
        UserError: names what is at fault and what to do.
    """
    check_config(hf_model.config)
    name = hf_model.config.model_type
    windows = windows_of(hf_model.config, len(layers_of(hf_model)))
    if "position_ids" not in inspect.signature(decoder_of(hf_model).forward).parameters:
        raise UserError(
            f"model: the decoder of {name} takes no position_ids, and would take each process's tokens for the first "
            "of the sequence; use a model with rotary or learned positions."
        )
    head = hf_model.get_output_embeddings() if hasattr(hf_model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"model: {name} has no linear lm_head; use a causal language model (AutoModelForCausalLM)."
        )
    # The loss computes with weight and bias alone. Whatever else the head learns may begin as 1, and not show yet.
    known = {id(part) for part in (*decoder_of(hf_model).parameters(), head.weight, head.bias)}
    others = [key for key, parameter in hf_model.named_parameters() if id(parameter) not in known]
    if others or type(head).forward is not nn.Linear.forward:
        raise UserError(
            f"model: {name} computes more than a linear lm_head after its decoder "
            f"({', '.join(others[:3]) or type(head).__name__}), which the chunked loss does not; use a model without."
        )
    # Off the attention interface, a layer would go on computing its own dense attention.
    if not getattr(hf_model, "_supports_attention_backend", False) and not _asks_the_interface(hf_model):
        raise UserError(
            f"model: {name} does not use transformers' attention interface; use a model that does."
        )
    _check_rotary(hf_model)
    _check_logits(hf_model)
    told = head_dim_of(hf_model.config)
    for index, attention in attention_modules(hf_model):
        check_asked(name, index, attention, windows[index])
        for field in _DROPOUT_FIELDS:
            rate = getattr(attention, field, None)
            rate = getattr(rate, "p", rate)
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


def _asks_the_interface(hf_model: Any) -> bool:
    """Whether the code of every attention looks its function up; some that do are not marked so."""
    return all(
        "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(attention).forward).__code__.co_names
        for _, attention in attention_modules(hf_model)
    )


def _check_rotary(hf_model: Any) -> None:
    """Refuse rotary embeddings that a process would compute otherwise than the whole sequence asks.

    Frequencies may follow the positions that a process happens to see. A ``partial_rotary_factor`` that the model's own
    code does not read would rotate part of a head by frequencies of another size, or all of it in silence.
    """
    config = hf_model.config
    rotary: Any = getattr(decoder_of(hf_model), "rotary_emb", None)
    for module in hf_model.modules():
        kinds = getattr(module, "rope_type", None)
        for rope_type in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if rope_type in LENGTH_ROPE_TYPES:
                raise UserError(
                    f"model: rope type {rope_type!r} of {config.model_type} takes its frequencies from the positions "
                    "that each process sees; call mtraining.model.fix_rope(model, seq_len) first, with the length of "
                    "the whole sequence."
                )
    for kind, parameters in ropes_of(config).items():
        partial = parameters.get("partial_rotary_factor")
        buffer = "inv_freq" if kind is None else f"{kind}_inv_freq"
        if partial in (None, 1, 1.0) or not hasattr(rotary, buffer):
            continue
        # Scaled types share one function, which reads it for all models; the plain type is each model's own code.
        plain = copy.deepcopy(config)
        kept = {
            "rope_type": "default",
            "rope_theta": parameters["rope_theta"],
            "partial_rotary_factor": partial,
        }
        plain.rope_parameters = kept if kind is None else {**config.rope_parameters, kind: kept}
        pairs = getattr(type(rotary)(plain), buffer).shape[-1]
        if pairs != (int(head_dim_of(config) * partial) + 1) // 2:
            raise UserError(
                f"model: {config.model_type} does not take partial_rotary_factor={partial}, and rotates whole heads; "
                "remove it, or use a model that does."
            )


@torch.no_grad()
def _check_logits(hf_model: Any) -> None:
    """Refuse a model whose logits are not those of `mtraining.model.logits`, whatever its config calls what it does.

    Asked of the model itself, with two random hidden states in place of its decoder's. On the meta device there are no
    numbers to compare, and the fields of the config must do.
    """
    # Here, so that options can be read without transformers.
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Decoded(MoeModelOutputWithPast):
        """A decoder's output with all that the heads of any architecture look for."""

        cross_attentions = None

    decoder, head = decoder_of(hf_model), hf_model.get_output_embeddings()
    weight = head.weight
    if weight.is_meta or isinstance(weight, DTensor):
        return
    hidden = torch.linspace(-2, 2, 2 * weight.shape[1], device=weight.device).view(1, 2, -1).to(weight.dtype)
    hidden = hidden.roll(1, -1)

    def decode(*_: Any, **__: Any) -> Decoded:
        return Decoded(last_hidden_state=hidden)

    own = vars(decoder).get("forward")
    decoder.forward = decode
    try:
        logits = hf_model(torch.zeros(1, 2, dtype=torch.long, device=weight.device), use_cache=False).logits
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
    form = LogitForm.of_fields(fields_of(hf_model.config))
    expected = Head(weight, head.bias, form).logits(hidden).float()
    same = logits.shape == expected.shape and torch.allclose(logits.float(), expected, rtol=1e-3, atol=1e-6)
    if not same:
        raise UserError(
            f"model: the logits of {hf_model.config.model_type} are not those of its lm_head: its own code changes "
            f"them by something other than a factor ({', '.join((*FACTORS, *DIVISORS))}), a soft cap "
            f"({', '.join(CAPS)}) and a bias, which is all that the chunked loss computes; use a model without that."
        )


def attention_modules(hf_model: Any) -> Iterator[tuple[int, nn.Module]]:
    """(layer index, its self-attention module) for each decoder layer.

    Raises:
        UserError: a layer has not exactly one attention, or one that is not plain causal softmax attention.
    """
    name = hf_model.config.model_type
    for index, layer in enumerate(layers_of(hf_model)):
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
        yield index, attention
