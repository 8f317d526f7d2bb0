"""What the sparse path cannot honour is refused by name before the first step."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from tiny_models import BLOCK, DENSE, FAMILIES, MORE_FAMILIES, SPARSE, tiny_batch, tiny_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, masking_utils

from mtraining.errors import UserError
from mtraining.model import check_supported, fix_rope, parallelize
from mtraining.model.logits import LogitForm
from mtraining.model.support import SUPPORTED_HEAD_DIMS, fields_of
from mtraining.pattern import Dense, build_pattern

SMALL: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def build(model_type: str, **fields: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **fields}))


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("gemma2", {"head_dim": 16, "layer_types": ["full_attention"] * 2}, r"caps its attention scores \(attn_logi"),
        ("qwen3_next", {"head_dim": 16}, r"layers of linear attention or a state space \(layer_types contains 'lin"),
        ("falcon_h1", {"head_dim": 16}, r"layers of a state space beside attention \(layer_types contains 'hybrid'"),
        ("deepseek_v3", {"num_key_value_heads": 2}, r"v_head_dim=128 .*\(multi-head latent attention\)"),
        ("falcon", {"alibi": True}, r"adds a bias by distance to its attention scores \(alibi\)"),
        ("llama", {"attention_dropout": 0.1}, r"attention dropout is not supported \(attention_dropout=0.1\)"),
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 2}, "attention dropout"),
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 2, "attn_pdrop": 0.0, "reorder_and_upcast_attn": True},
         r"attention of its own in fp32 \(reorder_and_upcast_attn\); set it to False"),
        ("llama", {"num_attention_heads": 2, "head_dim": 12}, "head_dim=12, which is not supported; use a multi"),
        ("llama", {"num_attention_heads": 2, "head_dim": 264}, "head_dim=264, which is not supported"),
        ("gemma4_text", {"head_dim": 16, "layer_types": ["full_attention"] * 2}, "another head_dim in some layers"),
        ("dory", {"head_dim": 16, "layer_types": ["full_attention"] * 2, "n_input_layers": 1, "n_recurrent_layers": 1,
                  "n_output_layers": 0}, r"computes more than a linear lm_head .*\(lm_head.logit_scale\)"),
        ("bloom", {"n_head": 2}, r"how many positions it knows"),
        ("bart", {"is_encoder_decoder": False}, "the decoder of bart takes no position_ids"),
        ("qwen3_moe", {"output_router_logits": True, "head_dim": 16}, "output_router_logits=True"),
    ],
)  # fmt: skip
def test_refused_by_name(model_type: str, fields: Any, message: str) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    with pytest.raises(UserError, match=message):
        check_supported(build(model_type, **fields))


MINICPM3: dict[str, Any] = {
    "num_key_value_heads": 2,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "dim_model_base": 8,
}


def test_what_a_config_computes_is_read_too() -> None:
    """MiniCPM3's factor is a property, absent from `to_dict()`: its loss was 4.905 where ours was 6.429."""
    with pytest.raises(
        UserError, match=r"heads of qk_head_dim=32 beside head_dim=16 \(multi-head latent att"
    ):
        check_supported(build("minicpm3", **{**MINICPM3, "qk_nope_head_dim": 16, "dim_model_base": 32}))
    model = build("minicpm3", **MINICPM3)
    fields = fields_of(model.config)
    assert fields["logits_scaling"] == 4.0 and fields["hidden_size"] == 32
    assert LogitForm.of_fields(fields) == LogitForm(scale=0.25)
    assert fields_of(build("qwen3_moe", head_dim=16).config)["num_experts"] == 128  # by its other name


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("minicpm3", MINICPM3),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {}),
        ("nanochat", {"final_logit_softcapping": 0.5}),
        ("phi", {}),
    ],
)
def test_logits_are_asked_of_the_model_itself(model_type: str, fields: Any) -> None:
    """Whatever the field is called that changes them: one whose name is not known is found out."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "lm_head.bias":
                parameter.fill_(0.3)
            elif "lm_head" in name or "embed_tokens" in name:
                parameter.mul_(30)  # a cap changes large logits only
    check_supported(model)
    if model_type == "phi":
        model.lm_head.forward = lambda x: torch.nn.functional.linear(x, model.lm_head.weight)
    with (
        mock.patch("mtraining.model.logits.FACTORS", ()),
        mock.patch("mtraining.model.logits.DIVISORS", ()),
        mock.patch("mtraining.model.logits.CAPS", ()),
    ):
        with pytest.raises(
            UserError, match=rf"the logits of {model_type} are not those of its lm_head: its own"
        ):
            check_supported(model)
        check_supported(build(model_type, **fields))  # on the meta device there are no numbers


def test_asking_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    tokens = tiny_batch().input_ids
    before = model(tokens).logits
    check_supported(model)
    assert "forward" not in vars(model.model) and torch.equal(model(tokens).logits, before)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [float(2 + pair) for pair in range(8)],
    "original_max_position_embeddings": 32,
}


def test_frequencies_by_length_are_refused_until_the_length_is_said() -> None:
    """Each process would take its own from the positions that it sees."""
    fields = {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 256,
    }
    model = build("phi3", **fields)
    with pytest.raises(
        UserError, match=r"rope type 'longrope' of phi3 takes its frequencies .*fix_rope\(model"
    ):
        check_supported(model)
    fix_rope(model, 256)
    check_supported(model)


def test_attention_dropout_is_asked_of_the_layers() -> None:
    model = build("llama")
    model.model.layers[1].self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"layer 1 of llama has attention dropout \(attention_dropout=0.1\)"):
        check_supported(model)


def test_kv_heads_that_do_not_divide_are_refused() -> None:
    model = build("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    model.config.num_key_value_heads = 3
    with pytest.raises(UserError, match="num_key_value_heads=3 does not divide num_attention_heads=4"):
        check_supported(model)


@pytest.mark.parametrize("attribute", ["is_encoder_decoder", "is_causal"])
def test_other_kinds_of_model_are_refused(attribute: str) -> None:
    model = build("llama")
    setattr(model.config, attribute, attribute == "is_encoder_decoder")
    with pytest.raises(UserError, match=attribute):
        check_supported(model)
    model = build("llama")
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UserError, match="layer 1 of llama has is_causal=False"):
        check_supported(model)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 8}),
        ("llama4_text", {"head_dim": 16, "layer_types": ["chunked_attention"] * 2}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("granite", {"logits_scaling": 1.0, "attention_dropout": 0.0}),
        ("llama", {"head_dim": 256}),
        ("olmo2", {}),
        ("cohere", {}),
        ("phi", {}),
        ("granite", {"logits_scaling": 4.0}),
        ("gpt_oss", {"head_dim": 16, "layer_types": ["full_attention"] * 2, "num_local_experts": 2}),
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 2, "attn_pdrop": 0.0}),
        ("stablelm", {}),
        (
            "qwen3_moe",
            {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
        ),
    ],
)
def test_supported(model_type: str, fields: Any) -> None:
    check_supported(build(model_type, **fields))


def test_head_dims_reach_the_usual_ones() -> None:
    assert {64, 96, 128, 256} <= set(SUPPORTED_HEAD_DIMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_patterns": {2: "dense"}}, "layer 2 does not exist; the model has layers 0 to 1"),
        ({"loss_chunk": 0}, "loss_chunk=0"),
        ({"param_dtype": torch.bfloat16}, "needs FSDP; give a mesh"),
        ({"pattern": "vertical-slash"}, "vertical_slash"),
        ({"layout": "stripe"}, "striped"),
        ({"kernel": "tritn"}, "triton"),
    ],
)
def test_wrong_options_of_parallelize_are_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parallelize(tiny_model("qwen2"), **options)


def test_a_model_is_parallelized_once() -> None:
    model = tiny_model("qwen2")
    parallelize(model)
    with pytest.raises(UserError, match="already given to parallelize"):
        parallelize(model)


@pytest.mark.parametrize("positions", [torch.arange(128).flip(0), torch.arange(128) + 1])
def test_tokens_dealt_otherwise_are_refused(positions: torch.Tensor) -> None:
    model = parallelize(tiny_model("qwen2"), pattern=Dense(block_size=BLOCK))
    batch = tiny_batch()
    with pytest.raises(UserError, match="layout 'striped' deals to context-parallel rank 0 of 1"):
        model(batch.input_ids, positions.expand(2, -1), batch.labels, batch.num_labels)


def test_attention_without_parallelize_is_refused() -> None:
    model = tiny_model("qwen2")
    model.set_attn_implementation("mtraining")
    with pytest.raises(UserError, match="call it first"):
        model(tiny_batch().input_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.ones(2, 128, dtype=torch.long)}, "attention_mask is not supported"),
        ({"attention_mask": torch.zeros(2, 1, 128, 128)}, "attention_mask is not supported"),
        ({"is_causal": False}, "asks for non-causal attention"),
        ({"softcap": 30.0}, "asks for soft-capping"),
    ],
)
def test_forward_arguments_that_cannot_be_honoured_are_refused(change: Any, message: str) -> None:
    model = parallelize(tiny_model("llama"), pattern=Dense(block_size=BLOCK))
    with pytest.raises(UserError, match=message):
        model.hf_model(tiny_batch().input_ids, use_cache=False, **change)


def test_a_mask_that_reaches_a_layer_is_refused() -> None:
    model = parallelize(tiny_model("llama"), pattern=Dense(block_size=BLOCK))
    layer, hidden = model.hf_model.model.layers[0], torch.zeros(1, 128, 48, dtype=torch.float64)
    rotary = model.hf_model.model.rotary_emb(hidden, torch.arange(128)[None])
    with pytest.raises(UserError, match="asks for an attention mask"):
        layer(hidden, position_embeddings=rotary, attention_mask=torch.zeros(1, 1, 128, 128))


def test_no_forward_looks_for_packed_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' search waits for the device."""

    def search(*_: Any) -> None:
        raise AssertionError("it looked")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", search)
    batch = tiny_batch()
    for family in (*FAMILIES, *MORE_FAMILIES):
        model = parallelize(tiny_model(family), pattern=Dense(block_size=BLOCK))
        model(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels)


def test_a_cached_prefix_is_refused() -> None:
    model = parallelize(tiny_model("llama"), pattern=Dense(block_size=BLOCK))
    tokens = tiny_batch().input_ids
    with torch.no_grad():
        output = model.hf_model(tokens, use_cache=True)
        name = "cache" if "cache" in output else "past_key_values"  # its name before transformers 5.24
        with pytest.raises(UserError, match="a key-value cache"):
            model.hf_model(tokens[:, :BLOCK], use_cache=True, **{name: output[name]})


def test_layer_patterns_replace_the_default_in_their_layers() -> None:
    default = build_pattern(**SPARSE)
    model = parallelize(tiny_model("qwen2"), pattern=default, layer_patterns={0: build_pattern(**DENSE)})
    patterns = [layer.self_attn.mtraining_runtime.pattern.inner for layer in model.hf_model.model.layers]
    assert patterns == [build_pattern(**DENSE), default]


def test_two_models_keep_their_own_settings() -> None:
    batch = tiny_batch()
    sparse, dense = (
        parallelize(tiny_model("qwen2"), pattern=build_pattern(**pattern)) for pattern in (SPARSE, DENSE)
    )
    first = sparse.hidden_states(batch.input_ids, batch.position_ids)
    other = dense.hidden_states(batch.input_ids, batch.position_ids)
    assert not torch.allclose(first, other)
    assert torch.equal(sparse.hidden_states(batch.input_ids, batch.position_ids), first)
