"""Sliding windows and chunks of models' layers: where they come from, documents among them, and what is not theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_cases import alone, packed_batch
from test_gradients import TOLERANCE, TOPOLOGIES, check
from test_packed import packed_gradients
from tiny_models import (
    BLOCK,
    DENSE,
    EXPERTS,
    SEQ_LEN,
    SPARSE,
    plain_gradients,
    relative_errors,
    tiny_batch,
    tiny_model,
)
from torch import Tensor
from transformers import AutoConfig

from distributed import ProcessPool
from mtraining.errors import UserError
from mtraining.evaluate.capture import visit_attention
from mtraining.generate import Generator
from mtraining.kernel import Chunks
from mtraining.layout import build_layout
from mtraining.model import parallelize
from mtraining.model.support import decoder_of
from mtraining.model.windows import band, windows_of
from mtraining.pattern import build_pattern
from mtraining.ring import Observer, chosen
from mtraining.train.balance import attention_record

WINDOW = 21
SLIDING, FULL, CHUNKED = "sliding_attention", "full_attention", "chunked_attention"
# Windows everywhere, beside full attention, with sinks, and chunks.
WINDOWED = ("mistral", "gemma3_text", "gpt_oss", "llama4_text")


def config_of(model_type: str, **fields: Any) -> Any:
    return AutoConfig.for_model(model_type, **{"num_hidden_layers": 3, "pad_token_id": 0, **fields})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (("mistral", {"sliding_window": 8}), (8, 8, 8)),
        (("mistral", {"sliding_window": None}), (None, None, None)),
        (("llama", {}), (None, None, None)),
        (("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}), (None, 8, 8)),
        (("qwen2", {"use_sliding_window": False, "sliding_window": 8}), (None, None, None)),
        (("gemma3_text", {"sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING]}), (8, None, 8)),
        (("llama4_text", {"attention_chunk_size": 8, "layer_types": [CHUNKED, FULL, CHUNKED]}),
         (Chunks(8), None, Chunks(8))),
    ],
)  # fmt: skip
def test_windows_of_a_config(config: tuple[str, dict[str, Any]], expected: tuple[Any, ...]) -> None:
    assert windows_of(config_of(config[0], **config[1]), 3) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": [SLIDING] * 3, "sliding_window": None}, "no sliding_window; set it to a number"),
        ({"layer_types": [CHUNKED] * 3}, "no attention_chunk_size; set it to a number"),
        ({"layer_types": [SLIDING] * 2, "sliding_window": 8}, "3 layers and 2 layer_types"),
        ({"layer_types": ["conv"] * 3}, "layers of a convolution in place of attention"),
        ({"layer_types": ["hybrid_sliding"] * 3}, "layers of hybrid sliding"),
        ({"sliding_window": 0}, "sliding_window=0, which is no number of tokens"),
        ({"attention_chunk_size": 8}, r"\(attention_chunk_size=8\) and does not say in which layers"),
    ],
)
def test_configs_without_a_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    config = config_of("llama")
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UserError, match=message):
        windows_of(config, 3)


def test_a_layer_that_asks_for_another_window_is_refused() -> None:
    """The config says one thing, and the module was built by another."""
    batch = tiny_batch()
    for own, words in ((7, "a sliding window of 7 tokens"), (None, "no sliding window")):
        model = parallelize(tiny_model("gemma3_text"), pattern=build_pattern(**DENSE))
        model.hf_model.model.layers[0].self_attn.sliding_window = own
        with pytest.raises(
            UserError, match=f"asks for {words} where .* a sliding window of 21 tokens; correct"
        ):
            model.hidden_states(batch.input_ids, batch.position_ids)
    model = parallelize(tiny_model("gemma3_text"), pattern=build_pattern(**DENSE))
    model.hf_model.model.layers[1].self_attn.sliding_window = 7
    with pytest.raises(
        UserError, match="asks for a sliding window of 7 tokens where .* full attention; correct"
    ):
        model.hidden_states(batch.input_ids, batch.position_ids)


def test_what_a_window_leaves_no_choice_of_is_refused() -> None:
    with pytest.raises(
        UserError, match="layer_patterns: layer 0 has a sliding window of 21 tokens in model.config"
    ):
        parallelize(tiny_model("gemma3_text"), layer_patterns={0: "dense"})
    with pytest.raises(UserError, match="layer_patterns: layer 0 has chunks of 21 tokens in model.config"):
        parallelize(tiny_model("llama4_text"), layer_patterns={0: "dense"})
    with pytest.raises(UserError, match="kernel: 'flash' attends from the first token on"):
        parallelize(tiny_model("mistral"), kernel="flash")
    # As a table of the model has them.
    parallelize(tiny_model("gemma3_text"), layer_patterns={0: band(WINDOW, 128), 1: "dense"})


RINGS = [
    ("cp1", "striped"),
    ("cp2", "contiguous"),
    ("cp2", "striped"),
    ("cp4", "zigzag"),
    ("cp2x2", "contiguous"),
]


@pytest.mark.parametrize(
    ("family", "topology", "layout"),
    [
        ("gpt_oss", "cp2", "contiguous"),
        ("llama4_text", "cp2", "striped"),
        ("gemma3_text", "cp1", "striped"),
        ("mistral", "cp4", "zigzag"),
        *(
            pytest.param(name, *ring, marks=[pytest.mark.slow, pytest.mark.sweep])
            for name in WINDOWED
            for ring in RINGS
        ),
    ],
)
def test_windows_equal_transformers_on_every_ring(
    pool: ProcessPool, family: str, topology: str, layout: str
) -> None:
    """Loss and every gradient, where transformers makes the masks of its own."""
    check(pool, {}, family, topology, pattern=DENSE, layout=layout, recompute="full")


@pytest.mark.parametrize(
    ("family", "topology", "layout", "recompute"),
    [
        ("gpt_oss", "dp2xcp2", "striped", "full"),
        ("llama4_text", "cp2", "contiguous", "keep_attention"),
        ("mistral", "cp2", "zigzag", "none"),
        pytest.param("gemma3_text", "cp4", "contiguous", "full", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "cp2x2", "contiguous", "full", marks=pytest.mark.slow),
        pytest.param("llama4_text", "cp4", "striped", "none", marks=pytest.mark.slow),
    ],
)
def test_packed_documents_have_windows_of_their_own(
    pool: ProcessPool, family: str, topology: str, layout: str, recompute: str
) -> None:
    """Equal to each document alone, in loss and every gradient; of gpt_oss with sinks, those of the sinks too."""
    expected_loss, expected = alone(tiny_model(family), packed_batch())
    loss, gradients = pool.run(
        packed_gradients, world=int(torch.tensor(TOPOLOGIES[topology][0]).prod()), family=family, topology=topology,
        layout=layout, recompute=recompute, micro=2,
    )[0]  # fmt: skip
    tolerance = 1e-5 if family in EXPERTS else TOLERANCE
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    errors = relative_errors(gradients, expected)
    assert max(errors.values()) < tolerance, errors
    assert family != "gpt_oss" or any("sinks" in name for name in errors)


def test_only_chosen_layers_are_held_covered_counted_and_averaged() -> None:
    model = parallelize(
        tiny_model("gemma3_text"), pattern=build_pattern(**SPARSE), refresh={"every_n": 2}, coverage=3
    )
    batch = tiny_batch()
    for step in (1, 2):
        with model.training_step(step), Observer(recall_rows=16) as observer:
            share = model(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels)
            share.backward()
    windowed, full = observer.stats
    assert (windowed.window, full.window) == (WINDOW, None) and chosen(observer.stats) == [full]
    near = torch.arange(SEQ_LEN // BLOCK) <= -(-(WINDOW - 1) // BLOCK)
    assert torch.equal(windowed.index.diagonals, near.expand_as(windowed.index.diagonals))
    assert windowed.density == 1.0 and windowed.recall == pytest.approx(1.0)
    assert full.recall is not None and 0 < full.density < 1
    assert {name.rpartition("_")[2] for name in model.indices.state() if name[:4] in ("diag", "dist")} == {
        "1"
    }
    record = attention_record(observer.stats)
    assert record["density"] == full.density and record["recall"] == full.recall
    assert record["layer_density"] == [1.0, full.density]
    assert 0 <= model.indices.uncovered(SEQ_LEN)["uncovered"] < 1
    alone = attention_record([windowed])
    assert "density" not in alone and "recall" not in alone and alone["layer_density"] == [1.0]


def test_a_model_of_windows_alone_refreshes_nothing() -> None:
    model = parallelize(tiny_model("mistral"), pattern=build_pattern(**SPARSE), refresh={"frozen_at": 1})
    batch = tiny_batch()
    for step in (1, 2):
        with model.training_step(step):
            model(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels).backward()
    assert model.indices.uncovered(SEQ_LEN) == {}
    assert set(model.indices.state()) == {"held_step"}


def test_windows_do_not_change_with_the_pattern() -> None:
    """Patterns choose in full layers alone, so a model of windows alone is exact under any."""
    expected = plain_gradients(tiny_model("mistral"), tiny_batch())[1]
    model = parallelize(
        tiny_model("mistral"), pattern=build_pattern(**SPARSE), layout=build_layout("striped", BLOCK)
    )
    batch = tiny_batch()
    model(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels).backward()
    got = {name: parameter.grad for name, parameter in model.hf_model.named_parameters()}
    assert max(relative_errors(got, expected).values()) < TOLERANCE  # type: ignore[arg-type]


@pytest.mark.parametrize("family", WINDOWED)
def test_capture_computes_windows_and_sinks_and_shows_full_layers(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(1)
    ids = batch.input_ids[:, : SEQ_LEN - 3]
    model.set_attn_implementation("eager")
    expected = model(ids, use_cache=False).logits
    seen: list[int] = []
    outputs: list[Tensor] = []
    hook = decoder_of(model).register_forward_hook(lambda *args: outputs.append(args[2].last_hidden_state))
    visit_attention(model, ids, lambda layer, *_: seen.append(layer))
    hook.remove()
    assert seen == [layer for layer, window in enumerate(windows_of(model.config, 2)) if window is None]
    got = model.get_output_embeddings()(outputs[0])
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


def test_generators_keep_windows_whatever_pattern_they_are_given() -> None:
    model = parallelize(tiny_model("gemma3_text"), pattern=build_pattern(**SPARSE)).eval()
    for given in (None, "dense", [build_pattern(**DENSE)] * 2):
        generator = Generator(model, pattern=given)
        windowed, full = generator.attention.patterns
        assert generator.attention.windows == (WINDOW, None)
        assert windowed == band(WINDOW, windowed.block_size)
        assert full.name == ("remembered" if given is None else "dense")
