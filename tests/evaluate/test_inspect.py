"""Attention of one text: sums against loops over tokens, and the page that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import vl_convert
from torch import Tensor

from mtraining.cli.inspect import inspect as command
from mtraining.errors import UserError
from mtraining.evaluate.capture import visit_attention
from mtraining.evaluate.inspect import Inspection, inspect_attention
from mtraining.evaluate.recall import attention_rows
from mtraining.model import ModelOptions, build_model
from mtraining.pattern import Dense, Pattern, SequenceShard, VerticalSlash, build_pattern
from mtraining.report import attention as page
from mtraining.report.figures import filled

TOKENS, BLOCK, LAYERS, HEADS = 64, 8, 2, 4
CONFIG = {
    "model_type": "qwen2", "vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
SPARSE = VerticalSlash(
    block_size=BLOCK,
    top_p=None,
    top_k_columns=4,
    slash_by="block",
    slash_density=0.2,
    sinks=2,
    window=2,
    probe=8,
)


@pytest.fixture(scope="module")
def hf_model() -> Any:
    torch.manual_seed(0)
    return build_model(ModelOptions(init="random", config=CONFIG), TOKENS)[0]


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(260, (TOKENS,), generator=torch.Generator().manual_seed(1))


def masks(hf_model: Any, ids: Tensor, pattern: Pattern) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """By layer and head: every row's attention, and every pair that the pattern computes, written out."""
    found = {}

    def visit(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        index = pattern.estimate(q, k, SequenceShard.whole(TOKENS), scale)
        every = torch.arange(TOKENS // BLOCK)
        for head in range(HEADS):
            mask = index.tile_mask(every, every)[0, head]
            mask = mask.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            for column in index.columns[0, head].tolist():
                if column < TOKENS:
                    mask[:, column] = True
            found[layer, head] = (attention_rows(q, k, torch.arange(TOKENS), head, scale), mask.tril())

    visit_attention(hf_model, ids[None], visit)
    return found


@pytest.mark.parametrize("pattern", [SPARSE, build_pattern("moba", block_size=BLOCK, chunk=16, top_k=1)])
def test_every_sum_is_that_of_the_pairs(hf_model: Any, ids: Tensor, pattern: Pattern) -> None:
    found = inspect_attention(hf_model, ids, [pattern] * LAYERS, rows=TOKENS, misses=3)
    assert found.rows.tolist() == list(range(TOKENS)) and found.maps.shape == (LAYERS, HEADS, TOKENS, TOKENS)
    assert found.distances == [0, 1, 2, 4, 8, 16, 32]
    for (layer, head), (mass, mask) in masks(hf_model, ids, pattern).items():
        kept = mass * mask
        assert found.recall[layer, head] == pytest.approx(float(kept.sum() / TOKENS), rel=1e-5)
        assert torch.allclose(found.maps[layer, head], mass, atol=1e-6)
        assert torch.equal(found.chosen[layer, head].bool(), mask)
        for place, begin in enumerate(found.distances):
            end = 2 * begin if begin else 1
            pairs = [(q, k) for q in range(TOKENS) for k in range(q + 1) if begin <= q - k < end]
            for values, got in ((mass, found.mass), (kept, found.kept)):
                expected = sum(float(values[pair]) for pair in pairs) / TOKENS
                assert got[layer, head, place] == pytest.approx(expected, abs=1e-6)
        missed = [(float(mass[q, k]), q, k) for q in range(TOKENS) for k in range(q + 1) if not mask[q, k]]
        top = [(miss.query, miss.key) for miss in found.misses if (miss.layer, miss.head) == (layer, head)]
        assert top == [(q, k) for _, q, k in sorted(missed, reverse=True)[:3]]


@pytest.mark.parametrize("windows", [(True, False), (True, True)], ids=["one layer", "both layers"])
def test_a_layer_with_a_window_is_exact_within_it(ids: Tensor, windows: tuple[bool, bool]) -> None:
    """Against transformers' own attention weights, and with the other layer's numbers where they belong."""
    types = ["sliding_attention" if window else "full_attention" for window in windows]
    config = {**CONFIG, "use_sliding_window": True, "sliding_window": 13, "layer_types": types}
    model = build_model(ModelOptions(init="random", config=config), TOKENS)[0]
    model.set_attn_implementation("eager")
    weights = model.eval()(ids[None], output_attentions=True, use_cache=False).attentions
    found = inspect_attention(model, ids, [SPARSE] * LAYERS, rows=TOKENS)
    for layer, window in enumerate(windows):
        assert torch.allclose(found.maps[layer], weights[layer][0], atol=1e-6)
        distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
        if window:
            assert found.windows[layer] == "a sliding window of 13 tokens"
            assert torch.equal(found.chosen[layer, 0].bool(), (distance >= 0) & (distance < 13))
            assert torch.allclose(found.recall[layer], torch.ones(HEADS, dtype=torch.float64))
            # 8 rows of blocks; the band of 13 tokens touches three of them.
            assert found.density[layer].tolist() == pytest.approx([(1 + 2 + 6 * 3) / 36] * HEADS)
            assert found.mass[layer, :, 5:].eq(0).all() and not [m for m in found.misses if m.layer == layer]
        else:
            assert layer not in found.windows and found.recall[layer].max() < 1
    of_pattern = [layer for layer, window in enumerate(windows) if not window] or [0, 1]
    assert found.means() == pytest.approx(
        (found.recall[of_pattern].mean().item(), found.density[of_pattern].mean().item())
    )
    text = page.attention_page(found, ids.tolist(), str, "small", "book.txt", "sparse")
    assert "a sliding window of 13 tokens in layers 0" in text


def test_a_map_is_coarser_than_the_text(hf_model: Any, ids: Tensor) -> None:
    found = inspect_attention(hf_model, ids, [SPARSE] * LAYERS, rows=16)
    assert len(found.rows) == 16 and found.rows[-1] == TOKENS - 1
    assert found.maps.shape[-1] == 16
    # Each row's mass is 1, wherever its keys are.
    assert torch.allclose(found.maps.sum(-1), torch.ones(LAYERS, HEADS, 16), atol=1e-5)
    assert found.chosen.amax() <= 1 and found.chosen.sum() > 0


def test_dense_attention_misses_nothing(hf_model: Any, ids: Tensor) -> None:
    found = inspect_attention(hf_model, ids, [Dense(block_size=BLOCK)] * LAYERS, rows=8)
    assert torch.allclose(found.recall, torch.ones(LAYERS, HEADS, dtype=torch.float64)) and not found.misses
    assert found.density.eq(1).all() and torch.allclose(found.mass, found.kept)


def test_a_length_that_no_block_divides_is_refused(hf_model: Any, ids: Tensor) -> None:
    with pytest.raises(UserError, match="60 tokens are not a multiple of the pattern's block size 8"):
        inspect_attention(hf_model, ids[:60], [SPARSE] * LAYERS)


def test_a_length_beyond_the_positions_is_refused(hf_model: Any) -> None:
    with pytest.raises(
        UserError, match="264 tokens are beyond the 256 positions of the model; lower --tokens"
    ):
        inspect_attention(hf_model, torch.zeros(264, dtype=torch.long), [SPARSE] * LAYERS)


@pytest.fixture
def inspected(hf_model: Any, ids: Tensor) -> Inspection:
    return inspect_attention(hf_model, ids, [SPARSE] * LAYERS, rows=32)


def test_the_page_shows_heads_maps_and_missed_tokens(inspected: Inspection, ids: Tensor) -> None:
    def decode(some: Any) -> str:
        return "".join(f"<{token}>" for token in some)

    text = page.attention_page(inspected, ids.tolist(), decode, "small", "book.txt", "sparse")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))  # type: ignore[union-attr]
    charts = {chart["name"]: chart for chart in data["charts"]}
    assert set(charts) == {"recall-heads", "density-heads", "against", "distance", "map"}
    assert len(charts["map"]["tables"]) == LAYERS * HEADS
    worst = inspected.recall.flatten().argmin().item()
    assert next(iter(charts["map"]["tables"])).startswith(f"layer {worst // HEADS}, head {worst % HEADS}:")
    miss = max(inspected.misses, key=lambda one: one.mass)
    assert (
        f"<mark>&lt;{ids[miss.key]}&gt;</mark>" in text and f"<mark>&lt;{ids[miss.query]}&gt;</mark>" in text
    )
    layer_one = charts["distance"]["tables"]["layer 1"]
    assert sum(layer_one["value"]) == pytest.approx(100, abs=0.1)


def test_its_charts_draw_on_paper(inspected: Inspection) -> None:
    for chart in (page._by_head(inspected, "recall"), page._against(inspected), page._distance(inspected)):
        assert "mark-" in vl_convert.vegalite_to_svg(filled(chart))
    assert vl_convert.vegalite_to_svg(filled(page._maps(inspected))).count("<path") > 32 * 33 / 2


def test_the_command_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--device tpu is not known"):
        command("none", tmp_path, device="tpu")
    with pytest.raises(UserError, match="--dtype half is not known"):
        command("none", tmp_path, dtype="half")
