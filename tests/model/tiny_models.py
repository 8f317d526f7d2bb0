"""Small models of each family, their batches, and plain transformers as the oracle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mtraining.model import ModelOptions, build_model
from mtraining.model.support import layers_of

SEQ_LEN = 128
BLOCK = 8
VOCAB = 97
SPARSE: dict[str, Any] = {
    "name": "vertical_slash",
    "block_size": BLOCK,
    "top_p": None,
    "top_k_columns": 8,
    "top_k_slashes": 6,
    "probe": 16,
    "sinks": 3,
    "window": 2,
}
DENSE: dict[str, Any] = {"name": "dense", "block_size": BLOCK}

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama": {"tie_word_embeddings": True},
    # a window in every layer; it ends within a block
    "mistral": {"sliding_window": 21, "num_key_value_heads": 3},
    # with a softmax scale of its own
    "granite": {"attention_multiplier": 0.4, "residual_multiplier": 0.7},
}

_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Each with something of its own around attention, or in how it is called.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "bitnet": {},
    "cohere": _TOKENS,  # logits times a factor
    "diffllama": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
    },  # attends twice a layer
    "ernie4_5": {},
    "gemma": {"head_dim": 16},
    # a window beside full attention, and rotary settings of their own for each
    "gemma3_text": {
        **_TOKENS,
        "head_dim": 16,
        "sliding_window": 21,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4": {"head_dim": 16, **_TOKENS},
    "gpt_neox": {"num_key_value_heads": None},  # parallel residual
    "helium": {"head_dim": 16},
    "hunyuan_v1_dense": {},
    "jetmoe": {
        "num_attention_heads": None,
        "kv_channels": 16,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    },
    "lfm2": {"layer_types": ["full_attention"] * 2},
    "nanochat": {"num_key_value_heads": 3, "final_logit_softcapping": 2.0},  # a soft cap on its logits
    "nemotron": {},
    "olmo2": {},
    "persimmon": {"num_key_value_heads": None},
    "phi": {},  # a bias on its lm_head
    # frequencies that depend on the length: the long ones here
    "phi3": {
        **_TOKENS,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 2 * SEQ_LEN,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + pair / 2 for pair in range(8)],
            "original_max_position_embeddings": 32,
        },
    },
    "smollm3": {**_TOKENS, "no_rope_layers": [1, 0]},
    "starcoder2": {},
}
# Whose experts transformers multiplies in fp32 or less.
EXPERTS: dict[str, dict[str, Any]] = {
    "flex_olmo": {**_TOKENS, "num_experts": 4, "num_experts_per_tok": 2},
    # sinks in the softmax of attention, and a window
    "gpt_oss": {
        **_TOKENS,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 21,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # chunks that are no multiple of a block
    "llama4_text": {
        **_TOKENS,
        "head_dim": 16,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 32,
        "attention_chunk_size": 21,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
EVERY_FAMILY = {**FAMILIES, **MORE_FAMILIES, **EXPERTS}


def tiny_options(family: str, dtype: str | None = None, **rope: Any) -> ModelOptions:
    """Options of a random two-layer model, fp64 where its family can; fields that are None there are left out."""
    own = {"model_type": family, **EVERY_FAMILY[family]}
    fields = {
        name: value for name, value in {**_COMMON, **own}.items() if value is not None or name not in _COMMON
    }
    dtype = dtype or ("float32" if family in EXPERTS else "float64")
    return ModelOptions.model_validate({"config": fields, "dtype": dtype, "rope": rope, "seed": 3})


def tiny_model(family: str, dtype: str | None = None) -> Any:
    """A random two-layer model; the same for every call and on every rank."""
    model = build_model(tiny_options(family, dtype), SEQ_LEN)[0]
    # The usual small initial weights give nearly uniform attention, where a wrong mask hardly shows.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(r"\b(q_proj|k_proj|qkv_proj|kv_proj|query_key_value)\.weight", name):
                parameter.mul_(12)
            elif name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1, 2, len(parameter)))
    return model


@dataclass
class Batch:
    """Whole sequences in global order, labels shifted; (batch, SEQ_LEN)."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor

    @property
    def num_labels(self) -> int:
        return int((self.labels != -100).sum())


def tiny_batch(rows: int = 2) -> Batch:
    """Random tokens whose label mask is uneven over rows, over halves and over stripes."""
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, VOCAB, (rows, SEQ_LEN + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    labels[0, : SEQ_LEN // 2 + 7] = -100
    labels[-1, 3 * BLOCK : 4 * BLOCK] = -100
    return Batch(tokens[:, :-1], torch.arange(SEQ_LEN).expand(rows, -1), labels)


def plain_gradients(
    model: Any, batch: Batch, masks: Sequence[Tensor] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of untouched transformers (eager attention, whole logits).

    Args:
        masks: for each layer the boolean (batch, heads, seq, seq) of what may be attended; None is causal.
    """
    model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "mtraining_rope_type"):
            module.rope_type = module.mtraining_rope_type  # transformers' own choice of frequencies
    hooks = []
    for layer, mask in zip(layers_of(model), masks or (), strict=False):
        bias = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, float("-inf"))

        def give(module: Any, args: Any, kwargs: dict[str, Any], bias: Tensor = bias) -> Any:
            return args, {**kwargs, "attention_mask": bias}

        (attention,) = (
            getattr(layer, name)
            for name in ("self_attn", "self_attention", "attention")
            if hasattr(layer, name)
        )
        hooks.append(attention.register_forward_pre_hook(give, with_kwargs=True))
    logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    total = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    loss = total / batch.num_labels
    loss.backward()
    for hook in hooks:
        hook.remove()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """For each gradient, largest error over largest entry."""
    assert got.keys() == expected.keys()
    return {
        name: float((got[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in got
    }
