"""Every recipe reads, and builds on the meta device: right sizes, rotary scaling and layout, no network."""

from pathlib import Path

import pytest

from mtraining.layout import build_layout
from mtraining.model import build_model
from mtraining.train.config import load_config

RECIPES = Path(__file__).parents[2] / "recipes"
# Parameters in millions, tied embeddings counted once; the two large ones as published by their makers.
SIZES = {
    "quickstart": 2.3,
    "qwen2.5-3b-512k": 3085.9,
    "qwen2.5-3b-128k-mix": 3085.9,
    "llama3.1-8b-512k": 8030.3,
    "smollm2-135m-64k": 134.5,
}


def test_every_recipe_is_tested() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_builds_on_the_meta_device(name: str) -> None:
    config = load_config(RECIPES / f"{name}.yaml")
    model, _ = build_model(config.model, config.train.seq_len, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(
        SIZES[name], rel=0.01
    )
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.config.max_position_embeddings >= config.train.seq_len
    pattern = config.pattern.build()
    build_layout(config.layout.name, config.layout.unit).check(
        config.train.seq_len, config.parallel.cp, pattern.block_size
    )


def test_the_small_recipe_is_the_studys_arm_that_widens() -> None:
    from mtraining.inputs.yaml_text import read_yaml

    study = read_yaml((RECIPES / "study" / "extend.yaml").read_text(encoding="utf-8"), "extend.yaml")
    config = load_config(RECIPES / "smollm2-135m-64k.yaml")
    arm, common = study["arms"]["widen"]["set"]["pattern"], study["config"]
    found = {**config.pattern.options, "name": config.pattern.name}
    assert arm.pop("anneal")["widen"] == config.pattern.anneal.widen
    assert {key: found[key] for key in arm} == arm
    assert config.pattern.anneal.widen_steps == config.train.steps / 2
    assert common["model"]["rope"] == {
        key: getattr(config.model.rope, key) for key in common["model"]["rope"]
    }
    for key in ("seq_len", "batch_size", "lr", "schedule"):
        assert getattr(config.train, key) == common["train"][key]


@pytest.mark.parametrize(
    ("name", "factor", "original"), [("qwen2.5-3b-512k", 16, 32768), ("llama3.1-8b-512k", 4, 131072)]
)
def test_the_papers_settings(name: str, factor: int, original: int) -> None:
    config = load_config(RECIPES / f"{name}.yaml")
    train, pattern = config.train, config.pattern.options
    assert (train.lr, train.betas, train.weight_decay, train.clip) == (2e-5, (0.9, 0.95), 0.0, 1.0)
    assert (train.dtype, train.recompute, train.seq_len) == ("bf16", "full", 524288)
    assert train.steps * train.batch_size * train.seq_len == pytest.approx(1e9, rel=0.05)
    assert (pattern["top_p"], pattern["max_columns"], pattern["max_slashes"]) == (0.95, 4096, 4096)
    model, _ = build_model(config.model, train.seq_len, device="meta")
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == (
        "yarn",
        factor,
        original,
    )
