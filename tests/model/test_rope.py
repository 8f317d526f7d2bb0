"""Context extension: frequencies against formulas written out here, coverage of the training length, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mtraining.errors import UserError
from mtraining.model import RopeOptions, fix_rope
from mtraining.model.fixed_rope import rope_fixed
from mtraining.model.rope import apply_rope, check_rope, stretched


def config(**fields: Any) -> Any:
    """One layer with the rotary shape of Qwen2.5: head_dim 128, theta 1e6, native 32K."""
    shape: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    small = {
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 11,
        "max_position_embeddings": 32768,
    }
    return Qwen2Config(**{**shape, **small, "rope_parameters": rope, **fields})


def frequencies(extended: Any) -> tuple[torch.Tensor, float]:
    """What a model built from the config really uses."""
    rotary = Qwen2ForCausalLM(extended).model.rotary_emb
    return rotary.inv_freq, rotary.attention_scaling


def yarn_paper(dim: int, theta: float, native: int, factor: float, fast: float, slow: float) -> list[float]:
    """NTK-by-parts (YaRN, section 3.2): the inverse frequency of each pair of dimensions.

    A pair that turns more than `fast` times within the native context keeps its own, one that turns less than `slow`
    times is interpolated, with a ramp over the pairs between.
    """

    def dimension_of(turns: float) -> float:
        # dimension d has wavelength 2 pi theta^(2d / dim); solve native / wavelength = turns for d
        return dim / 2 * math.log(native / (turns * 2 * math.pi)) / math.log(theta)

    low, high = math.floor(dimension_of(fast)), math.ceil(dimension_of(slow))
    result = []
    for d in range(dim // 2):
        own = theta ** (-2 * d / dim)
        interpolated = min(1.0, max(0.0, (d - low) / (high - low)))
        result.append(own / factor * interpolated + own * (1 - interpolated))
    return result


@pytest.mark.parametrize("factor", [16.0, 32.0, None])
def test_yarn_equals_the_paper(factor: float | None) -> None:
    extended = config()
    apply_rope(extended, RopeOptions(type="yarn", factor=factor), seq_len=524288)
    used = factor or 16.0
    assert extended.max_position_embeddings == int(used * 32768)
    assert extended.rope_parameters["original_max_position_embeddings"] == 32768
    inv_freq, scaling = frequencies(extended)
    expected = torch.tensor(yarn_paper(128, 1e6, 32768, used, 32, 1))
    torch.testing.assert_close(inv_freq, expected, rtol=1e-5, atol=0)
    assert scaling == pytest.approx(0.1 * math.log(used) + 1)
    turns = 32768 * 1e6 ** (-torch.arange(0, 128, 2) / 128) / (2 * math.pi)
    own = 1e6 ** (-torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(inv_freq[turns > 40], own[turns > 40])
    torch.testing.assert_close(inv_freq[turns < 0.9], own[turns < 0.9] / used)


def test_yarn_options_reach_the_model() -> None:
    extended = config()
    options = RopeOptions(
        type="yarn",
        factor=4,
        original_max_position_embeddings=8192,
        theta=5e5,
        beta_fast=16,
        beta_slow=2,
        attention_factor=1.5,
    )
    apply_rope(extended, options, seq_len=32768)
    inv_freq, scaling = frequencies(extended)
    torch.testing.assert_close(
        inv_freq, torch.tensor(yarn_paper(128, 5e5, 8192, 4, 16, 2)), rtol=1e-5, atol=0
    )
    assert scaling == 1.5
    assert extended.max_position_embeddings == 32768


def test_linear_divides_every_frequency() -> None:
    extended = config()
    apply_rope(extended, RopeOptions(type="linear"), seq_len=131072)
    inv_freq, scaling = frequencies(extended)
    torch.testing.assert_close(inv_freq, 1e6 ** (-torch.arange(0, 128, 2) / 128) / 4)
    assert scaling == 1.0
    assert extended.max_position_embeddings == 131072


@pytest.mark.parametrize("factor", [None, 2.0])
def test_dynamic_is_resolved_once_at_the_training_length(factor: float | None) -> None:
    extended = config()
    apply_rope(extended, RopeOptions(type="dynamic", factor=factor), seq_len=262144)
    assert extended.rope_parameters["rope_type"] == "default"
    inv_freq, _ = frequencies(extended)
    # what transformers' dynamic type would reach on a process that saw the last position
    theirs = config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": factor or 1.0})
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, torch.device("cpu"), seq_len=262144)
    torch.testing.assert_close(inv_freq, expected)
    if factor is None:  # the fastest stays, the slowest is stretched by the ratio of lengths
        slowest = 1e6 ** (-126 / 128) / 8
        assert inv_freq[0] == 1 and inv_freq[-1].item() == pytest.approx(slowest, rel=1e-5)


def test_theta_alone_extends() -> None:
    extended = config()
    apply_rope(extended, RopeOptions(theta=5e7), seq_len=65536)
    assert extended.max_position_embeddings == 65536
    torch.testing.assert_close(frequencies(extended)[0], 5e7 ** (-torch.arange(0, 128, 2) / 128))


def test_none_leaves_the_config_alone() -> None:
    extended = config()
    before = extended.to_dict()
    apply_rope(extended, RopeOptions(), seq_len=32768)
    assert extended.to_dict() == before


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_an_extended_model_is_extended_again_only_from_a_named_length() -> None:
    def llama() -> Any:
        return LlamaConfig(max_position_embeddings=131072, rope_parameters=dict(LLAMA3))

    apply_rope(llama(), RopeOptions(), seq_len=131072)  # as it is: fixed frequencies, fine
    with pytest.raises(UserError, match=r"already has rope type 'llama3'.*original_max_position_embeddings"):
        apply_rope(llama(), RopeOptions(type="yarn"), seq_len=524288)
    extended = llama()
    apply_rope(extended, RopeOptions(type="yarn", original_max_position_embeddings=131072), seq_len=524288)
    assert extended.rope_parameters["factor"] == 4.0
    assert "low_freq_factor" not in extended.rope_parameters


OWN_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.25,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
    "truncate": False,
}


def test_a_yarn_model_keeps_its_own_settings() -> None:
    extended = config(rope_parameters=dict(OWN_YARN), max_position_embeddings=32768)
    apply_rope(extended, RopeOptions(type="yarn"), seq_len=131072)
    assert extended.rope_parameters == {**OWN_YARN, "factor": 16.0}
    assert extended.max_position_embeddings == 131072
    _, scaling = frequencies(extended)
    assert scaling == 1.25


def test_every_one_of_them_can_be_replaced() -> None:
    asked: dict[str, Any] = {
        "factor": 5.0,
        "original_max_position_embeddings": 16384,
        "beta_fast": 16.0,
        "beta_slow": 1.5,
        "truncate": True,
    }
    own = {"rope_type": "yarn", "rope_theta": 5e5}
    for scaling in ({"attention_factor": 1.5}, {"mscale": 0.7, "mscale_all_dim": 0.9}):
        extended = config(rope_parameters=dict(OWN_YARN), max_position_embeddings=32768)
        apply_rope(extended, RopeOptions(type="yarn", theta=5e5, **asked, **scaling), seq_len=65536)
        assert extended.rope_parameters == {**own, **asked, **scaling}  # no attention_factor to hide mscale


def test_another_method_takes_nothing_over_from_yarn() -> None:
    extended = config(rope_parameters=dict(OWN_YARN), max_position_embeddings=32768)
    with pytest.raises(UserError, match=r"already has rope type 'yarn'; to replace it by linear set"):
        apply_rope(extended, RopeOptions(type="linear"), seq_len=131072)
    apply_rope(extended, RopeOptions(type="linear", original_max_position_embeddings=8192), seq_len=131072)
    assert extended.rope_parameters == {"rope_type": "linear", "rope_theta": 1e6, "factor": 16.0}


def test_truncation_and_mscale_reach_the_frequencies() -> None:
    plain, other = config(), config()
    apply_rope(plain, RopeOptions(type="yarn", factor=4), seq_len=131072)
    asked = RopeOptions(type="yarn", factor=4, truncate=False, mscale=1.0, mscale_all_dim=0.5)
    apply_rope(other, asked, seq_len=131072)
    ramp = (frequencies(plain)[0] - frequencies(other)[0]).abs() > 0
    assert ramp.any() and not ramp.all()  # the ends of the ramp only
    expected = (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert frequencies(other)[1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("native", "factor", "positions"),
    [
        (7168, 7808 / 7168, 7808),  # the float's product is 7807.999...
        (7000, 1.15, 8050),  # whose float is below 1.15
        (32768, 2.3, 75366),  # 75366.4
        (32768, 1.0, 32768),
        (3, 1 / 3 * 4, 4),
        (131072, 8.0, 1048576),
    ],
)
def test_positions_are_counted_exactly(native: int, factor: float, positions: int) -> None:
    assert stretched(native, factor) == positions


@pytest.mark.parametrize("method", ["yarn", "linear"])
def test_any_length_is_reached_without_a_factor(method: Any) -> None:
    for native, seq_len in [(7168, 7808), (32768, 524288), (100, 333), (4096, 4096), (4096, 128)]:
        extended = config(max_position_embeddings=native)
        apply_rope(extended, RopeOptions(type=method), seq_len)
        assert extended.max_position_embeddings == max(native, seq_len)
        assert extended.rope_parameters["factor"] == max(native, seq_len) / native


@pytest.mark.parametrize(
    ("options", "seq_len", "message"),
    [
        ({}, 40000, r"training length 40000 is beyond the 32768.*yarn with a factor of at least 1\.23"),
        ({"type": "yarn", "factor": 4}, 262144, r"factor=4 stretches 32768 positions to 131072.*at least 8"),
        ({"type": "linear", "beta_fast": 16}, 65536, r"beta_fast has no effect with type=linear"),
        ({"factor": 2}, 32768, r"factor has no effect with type=none"),
        (
            {"type": "yarn", "mscale": 1.0},
            65536,
            "mscale has no effect alone; set both mscale and mscale_all_dim",
        ),
        (
            {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0},
            65536,
            "mscale has no effect beside model.rope.attention_factor",
        ),
        ({"type": "dynamic", "truncate": False}, 65536, r"truncate has no effect with type=dynamic"),
        (
            {"type": "linear", "factor": 1.19},
            39000,
            r"factor=1.19 stretches 32768 positions to 38993.* at least 1.2\.$",
        ),
    ],
)
def test_lengths_and_options_that_do_not_fit_are_refused(options: Any, seq_len: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_rope(config(), RopeOptions(**options), seq_len)


def test_multi_axis_positions_are_refused() -> None:
    axes = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    with pytest.raises(UserError, match="mrope_section"):
        check_rope(config(rope_parameters=axes))


LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + pair / 64 for pair in range(64)],
    "long_factor": [2.0 + pair for pair in range(64)],
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    "parameters",
    [LONG, {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}],
    ids=["longrope", "dynamic"],
)
@pytest.mark.parametrize("seq_len", [2048, 4096, 4097, 32768, 65536])
def test_frequencies_by_length_are_fixed_at_the_whole_length(parameters: Any, seq_len: int) -> None:
    """Those of transformers for a process that sees the last position, for every process whatever it sees."""
    model = Qwen2ForCausalLM(config(rope_parameters=dict(parameters)))
    rotary, x = model.model.rotary_emb, torch.zeros(1, 1, 8)
    last = torch.tensor([[seq_len - 1]])
    theirs = rotary(x, last)
    fix_rope(model, seq_len)
    ours = rotary(x, last)
    rotary(x, torch.tensor([[3]]))  # the first rank of a contiguous layout
    again = rotary(x, last)
    for cosines in (ours, again):
        torch.testing.assert_close(cosines, theirs, rtol=0, atol=0)
    assert model.config.rope_parameters["rope_type"] == parameters["rope_type"]  # what an export says


def test_a_length_holds_inside_and_the_one_before_comes_back() -> None:
    model = Qwen2ForCausalLM(config(rope_parameters=dict(LONG)))
    fix_rope(model, 32768)
    long = model.model.rotary_emb.inv_freq.clone()
    with rope_fixed(model, 100):
        assert not torch.equal(model.model.rotary_emb.inv_freq, long)
    assert torch.equal(model.model.rotary_emb.inv_freq, long)


def by_layer_type() -> Any:
    small: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 4096,
    }
    return Gemma3TextConfig(**small, layer_types=["sliding_attention", "full_attention"])


def test_full_layers_alone_are_stretched() -> None:
    """A window's distances stay what they were."""
    stretched_config, before = by_layer_type(), by_layer_type()
    apply_rope(stretched_config, RopeOptions(type="yarn", factor=4.0), seq_len=16384)
    assert stretched_config.max_position_embeddings == 16384
    found, native = stretched_config.rope_parameters, before.rope_parameters
    assert found["sliding_attention"] == native["sliding_attention"]
    assert found["full_attention"]["rope_type"] == "yarn" and found["full_attention"]["factor"] == 4.0
    assert found["full_attention"]["rope_theta"] == native["full_attention"]["rope_theta"]
    rotary, plain = (Gemma3ForCausalLM(one).model.rotary_emb for one in (stretched_config, before))
    assert torch.equal(rotary.sliding_attention_inv_freq, plain.sliding_attention_inv_freq)
    assert not torch.equal(rotary.full_attention_inv_freq, plain.full_attention_inv_freq)
    raised = by_layer_type()
    apply_rope(raised, RopeOptions(theta=5e7), seq_len=8192)
    assert raised.rope_parameters["full_attention"]["rope_theta"] == 5e7
    assert raised.rope_parameters["sliding_attention"] == native["sliding_attention"]


@pytest.mark.parametrize(
    ("options", "seq_len", "message"),
    [
        (
            {},
            200,
            "beyond the 128 positions of the model, which are not rotary and cannot be stretched; set train.seq",
        ),
        ({"type": "yarn"}, 256, "gpt2 has no rotary embedding in its layers of full attention"),
        ({"theta": 1e6}, 128, "gpt2 has no rotary embedding"),
    ],
)
def test_learned_positions_cannot_be_stretched(options: Any, seq_len: int, message: str) -> None:
    learned = GPT2Config(n_positions=128)
    apply_rope(learned, RopeOptions(), 128)
    with pytest.raises(UserError, match=message):
        apply_rope(learned, RopeOptions(**options), seq_len)
