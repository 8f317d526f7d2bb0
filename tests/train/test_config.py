"""Reading configurations: overrides, and one sentence for every mistake."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from tiny_run import raw_config

from mtraining.errors import UserError
from mtraining.model import ModelOptions
from mtraining.pattern import PATTERNS
from mtraining.train.config import Config, LayoutSection, TrainSection, load_config, parse_config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_config(tmp_path / "run", tmp_path / "data")), encoding="utf-8")
    return path


def test_overrides_are_parsed_as_yaml(recipe: Path) -> None:
    config = load_config(
        recipe, ["train.steps=9", "train.lr=3e-4", "parallel={dp: 2, cp: 1}", "train.clip=null"]
    )
    assert (config.train.steps, config.train.lr, config.parallel.dp, config.train.clip) == (9, 3e-4, 2, None)


def test_a_pattern_may_be_named_alone_and_then_refined(recipe: Path) -> None:
    assert load_config(recipe, ["pattern=dense"]).pattern.options == {"block_size": 128}
    config = load_config(recipe, ["pattern=dense", "pattern.block_size=32"])
    assert config.pattern.build().block_size == 32


def test_what_is_saved_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["checkpoint.async=false", "layer_patterns={0: dense}"])
    assert reread(config, tmp_path) == config


def test_an_override_reaches_a_layer_by_its_number(recipe: Path) -> None:
    given = ["layer_patterns={1: dense, 0: dense}", "layer_patterns.1=moba", "layer_patterns.0.block_size=64"]
    layers = load_config(recipe, given).layer_patterns
    assert {layer: choice.name for layer, choice in layers.items()} == {0: "dense", 1: "moba"}
    assert layers[0].options == {"block_size": 64}


def reread(config: Config, folder: Path) -> Config:
    """The configuration that its own file gives."""
    (folder / "saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return load_config(folder / "saved.yaml")


def options_below(kind: type[BaseModel], where: str = "") -> list[str]:
    """The dotted names of all options of a section and of the sections in it."""
    names = []
    for name, field in kind.model_fields.items():
        key = f"{where}{field.alias or name}"
        inner = field.annotation
        nested = isinstance(inner, type) and issubclass(inner, BaseModel)
        names += options_below(inner, f"{key}.") if nested else [key]  # type: ignore[arg-type]
    return names


def test_every_option_stands_in_what_is_saved(recipe: Path) -> None:
    saved = yaml.safe_load(load_config(recipe).to_yaml())
    names = options_below(Config)
    assert {"train.betas", "checkpoint.async", "model.rope.factor", "pattern.refresh"} <= set(names)
    for name in names:
        node = saved
        for part in name.split("."):
            assert part in node, name
            node = node[part]


@pytest.mark.parametrize("name", PATTERNS)
def test_every_option_of_a_pattern_stands_in_what_is_saved(recipe: Path, tmp_path: Path, name: str) -> None:
    given: dict[str, object] = {"name": name}
    if name == "union":
        given["patterns"] = ["dense", {"name": "a_shape", "options": {"window": 256}}]
    text = yaml.safe_dump(given, default_flow_style=True, width=1000).strip()
    config = load_config(recipe, [f"pattern={text}", f"layer_patterns={{1: {text}}}"])
    saved = yaml.safe_load(config.to_yaml())
    for section in (saved["pattern"], saved["layer_patterns"]["1"]):
        defaults = {
            f.name: f.default for f in fields(PATTERNS[name]) if (name, f.name) != ("union", "patterns")
        }
        assert section.items() >= {"name": name, **defaults}.items()
    if name == "union":
        dense, shaped = saved["pattern"]["patterns"]
        assert dense == {"name": "dense", "options": {"block_size": 128}}
        assert shaped["options"].items() >= {"block_size": 128, "window": 256}.items()
    again = reread(config, tmp_path)
    assert again == config and again.pattern.build() == config.pattern.build()
    assert again.patterns_by_layer == config.patterns_by_layer


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {lr: 1}\nmodel: 1\ntrain: 2\n", "the key train stands twice, in lines 1 and 3; keep one"),
        ("train:\n  lr: 1\n  steps: 2\n  lr: 3\n", "the key train.lr stands twice, in lines 2 and 4"),
        ("a:\n- b: 1\n- c: 1\n  c: 2\n", "the key a.1.c stands twice, in lines 3 and 4"),
        ("layer_patterns: {1: dense, 0x1: dense}", "the key layer_patterns.0x1 stands twice, in line 1"),
        ('{"a": 1,\n"a": 2}', "the key a stands twice, in lines 1 and 2"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "twice.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"^configuration file .*twice.yaml: {sentence}"):
        load_config(tmp_path / "twice.yaml")


def test_what_a_merge_brings_may_be_overridden(recipe: Path) -> None:
    config = load_config(recipe, ["parallel={<<: {dp: 2, cp: 3}, cp: 1}"])
    assert (config.parallel.dp, config.parallel.cp) == (2, 1)


def test_numbers_may_have_an_exponent_and_no_point(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["model.config.rope_theta=1e6", "train.eps=1e-6", "model.tokenizer='1e6'"])
    assert config.model.config["rope_theta"] == 1e6 and config.train.eps == 1e-6
    assert reread(config, tmp_path) == config and config.model.tokenizer == "1e6"


@pytest.mark.parametrize(
    ("kind", "values", "sentence"),
    [
        (ModelOptions, {"confg": {}}, "unknown key confg in ModelOptions; did you mean config?"),
        (ModelOptions, {"init": ""}, "init='' in ModelOptions is not valid: string should have at least 1"),
        (ModelOptions, {"rope": {"type": "yarnn"}}, "rope.type='yarnn' in ModelOptions is not valid"),
        (LayoutSection, {"unit": 0}, "unit=0 in LayoutSection is not valid: input should be greater than 0."),
        (TrainSection, {"steps": 3}, "TrainSection lacks the required key seq_len."),
    ],
)
def test_options_made_in_python_get_one_sentence_too(
    kind: type[BaseModel], values: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError) as raised:
        kind(**values)
    assert str(raised.value).startswith(sentence) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.seqlen=9", "unknown key train.seqlen in .*; did you mean train.seq_len?"),
        ("trian.steps=9", "unknown key trian in .*; did you mean train?"),
        ("checkpoint.asinc=true", "did you mean checkpoint.async?"),
        ("model.confg={}", "did you mean model.config?"),
        ("model.rope.fctor=2", "did you mean model.rope.factor?"),
        ("train.steps=0", "train.steps=0 .* greater than 0"),
        ("train.schedule=cubic", "train.schedule='cubic' .* 'cosine', 'linear', 'constant' or 'wsd'"),
        ("train.batch_size=3", "train.batch_size=3 must be a multiple of .* = 2; the nearest is 4"),
        ("parallel={cp: 4, cp_outer: 3}", "cp_outer=3 must divide cp=4"),
        ("train.steps", "--set 'train.steps' is not of the form"),
        ("train.steps.more=1", "train.steps is a value, not a section"),
        ("train.steps=[1", "the value is not valid YAML"),
        ("parallel={dp: 1, dp: 2}", r"--set .*: the value: the key dp stands twice, in line 1; keep one"),
        ("layer_patterns={0: dense, '0': moba}", "^layer_patterns: layer 0 stands twice; keep one of them.$"),
        (
            "layer_patterns={1: moab}",
            r"^layer_patterns.1: pattern: 'moab' is not known \(did you mean 'moba'",
        ),
        ("pattern=dens", r"^pattern: 'dens' is not known \(did you mean 'dense'\?\); choose one of"),
        ("pattern.topp=1", r"^pattern.topp: vertical_slash has no such option \(did you mean 'top_p'\?\)"),
        ("pattern={name: [1]}", "^pattern.name="),
        (
            "pattern.refresh={every: 2}",
            "^pattern.refresh: {'every': 2} is not known; use every_step, {every_n: k}",
        ),
        ("distributed.silence_seconds=3", "silence_seconds=3 would end healthy runs .*; use 10 or more"),
        ("distributed.silence_seconds=.inf", "distributed.silence_seconds=inf .* finite number"),
        ("pattern.refresh={every_n: 0}", "^pattern.refresh: {'every_n': 0} is not known; .* at least 1.$"),
    ],
)
def test_mistakes_get_one_sentence(recipe: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        load_config(recipe, [override])
    assert "\n" not in str(raised.value)


def test_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("train: [", encoding="utf-8")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(bad)
    bad.write_text("- 1", encoding="utf-8")
    with pytest.raises(UserError, match="must hold a mapping"):
        load_config(bad)
    with pytest.raises(UserError, match="lacks the required key"):
        parse_config({"output": "x"})
