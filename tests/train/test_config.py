"""Reading configurations: overrides, and one sentence for every mistake."""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from tiny_run import raw_config

from mtraining.errors import UserError
from mtraining.train.config import TrainSection, load_config, parse_config
from mtraining.train.schedule import learning_rate


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
    assert load_config(recipe, ["pattern=dense"]).pattern.options == {}
    config = load_config(recipe, ["pattern=dense", "pattern.block_size=32"])
    assert config.pattern.build().block_size == 32


def test_what_is_saved_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["checkpoint.async=false", "layer_patterns={0: dense}"])
    (tmp_path / "saved.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.seqlen=9", "unknown key train.seqlen in .*; did you mean train.seq_len?"),
        ("trian.steps=9", "unknown key trian in .*; did you mean train?"),
        ("checkpoint.asinc=true", "did you mean checkpoint.async?"),
        ("model.confg={}", "did you mean model.config?"),
        ("model.rope.fctor=2", "did you mean model.rope.factor?"),
        ("train.steps=0", "train.steps=0 .* greater than 0"),
        ("train.schedule=linear", "train.schedule='linear' .* 'cosine' or 'constant'"),
        ("train.batch_size=3", "train.batch_size=3 must be a multiple of .* = 2; the nearest is 4"),
        ("parallel={cp: 4, cp_outer: 3}", "cp_outer=3 must divide cp=4"),
        ("train.steps", "--set 'train.steps' is not of the form"),
        ("train.steps.more=1", "train.steps is a value, not a section"),
        ("train.steps=[1", "the value is not valid YAML"),
        (
            "pattern.refresh={every: 2}",
            "^pattern.refresh: {'every': 2} is not known; use every_step, {every_n: k}",
        ),
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


def test_warm_up_then_cosine_then_the_floor() -> None:
    options = TrainSection(seq_len=16, steps=100, lr=1.0, min_lr=0.1, warmup_steps=20)
    rates = [learning_rate(step, options) for step in range(101)]
    assert 0 < rates[0] < rates[10] < rates[19] < rates[20] == 1.0
    assert rates[60] == pytest.approx(0.55)  # half-way between peak and floor
    assert rates[100] == pytest.approx(0.1)  # one step past the end
    assert rates[99] > 0.1
    assert all(later <= earlier for earlier, later in pairwise(rates[20:]))


def test_constant_schedule_keeps_the_peak() -> None:
    options = TrainSection(seq_len=16, steps=10, lr=0.5, schedule="constant", warmup_steps=1)
    assert [learning_rate(step, options) for step in (0, 1, 9)] == [0.25, 0.5, 0.5]
