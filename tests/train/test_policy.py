"""Every option has a rule for what a resumed run does when it changes, the rule is kept, and the docs show it."""

import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tiny_run import raw_config

from mtraining.errors import UserError
from mtraining.train.config import Config, PatternChoice, SourceSection, parse_config
from mtraining.train.identity import check_options
from mtraining.train.policy import (
    OPEN,
    POLICIES,
    declared_options,
    flat_options,
    policy,
    with_table,
)
from mtraining.train.store import Manifest

PAGE = Path(__file__).parents[2] / "docs" / "resume.md"
DONE = 3
# For every option a value that is neither the default nor that of the tiny run.
OTHER: dict[str, Any] = {
    "output": "elsewhere",
    "model.init": "some/folder",
    "model.config": {"model_type": "llama"},
    "model.tokenizer": "some/tokenizer",
    "model.weights_prefix": "base_model.model.",
    "model.dtype": "bfloat16",
    "model.seed": 7,
    "model.rope.type": "yarn",
    "model.rope.factor": 4.0,
    "model.rope.original_max_position_embeddings": 64,
    "model.rope.theta": 5e5,
    "model.rope.beta_fast": 16.0,
    "model.rope.beta_slow": 2.0,
    "model.rope.attention_factor": 1.5,
    "model.rope.truncate": False,
    "model.rope.mscale": 0.7,
    "model.rope.mscale_all_dim": 0.9,
    "model.lora.r": 8,
    "model.lora.alpha": 3.0,
    "model.lora.targets": ["q_proj"],
    "model.lora.also_train": ["norm"],
    "model.lora.dropout": 0.1,
    "model.lora.rslora": True,
    "data.path": "other/shards",
    "data.sources": [{"path": "code", "weight": 2.0}, {"path": "books"}],
    "data.mode": "concat",
    "data.look_ahead": 7,
    "data.workers": 2,
    "data.allow_other_tokenizer": True,
    "train.seq_len": 128,
    "train.steps": 9,
    "train.batch_size": 8,
    "train.micro_batch_size": 4,
    "train.lr": 1e-4,
    "train.min_lr": 1e-5,
    "train.schedule": "constant",
    "train.warmup_steps": 2,
    "train.decay_steps": 3,
    "train.decay": "linear",
    "train.betas": [0.8, 0.9],
    "train.eps": 1e-3,
    "train.weight_decay": 50.0,
    "train.clip": None,
    "train.dtype": "bf16",
    "train.recompute": "none",
    "train.offload": True,
    "train.fused": "compile",
    "train.float8": "emulated",
    "train.optimizer_state": "8bit",
    "train.loss_chunk": 64,
    "train.kernel": "reference",
    "train.deterministic": True,
    "train.seed": 5,
    "pattern.name": "dense",
    "pattern.*": {"top_p": 0.5},
    "pattern.table": "table.json",
    "pattern.dense_layers": 1,
    "pattern.refresh": {"every_n": 2},
    "pattern.coverage": 4,
    "pattern.anneal.dense_first": 5,
    "pattern.anneal.dense_every": 3,
    "pattern.anneal.widen": 2.0,
    "pattern.anneal.widen_steps": 8,
    "layer_patterns": {1: {"name": "dense", "block_size": 16}},
    "layout.name": "contiguous",
    "layout.unit": 32,
    "parallel.dp": 2,
    "parallel.cp": 2,
    "parallel.cp_outer": 2,
    "checkpoint.every": 1,
    "checkpoint.keep_last": 9,
    "checkpoint.async": False,
    "checkpoint.resume": "step_00000003",
    "checkpoint.allow": ["data"],
    "checkpoint.export": True,
    "evaluate.every": 2,
    "evaluate.at_start": False,
    "evaluate.data": "other/text",
    "evaluate.suites": ["needle"],
    "evaluate.lengths": [64],
    "evaluate.attention": ["dense"],
    "evaluate.max_sequences": 3,
    "evaluate.bucket": 16,
    "evaluate.keep_best": True,
    "evaluate.needle_samples": 2,
    "evaluate.essays": "essays.txt",
    "evaluate.seed": 1,
    "log.every": 1,
    "log.trackers": ["tensorboard"],
    "log.project": "contexts",
    "log.recall_rows": 8,
    "distributed.timeout_seconds": 60.0,
    "distributed.silence_seconds": 60.0,
    "distributed.device": "auto",
}
_RANK = {"model.lora.r": 4}  # without it the others have no effect
TOGETHER: dict[str, dict[str, Any]] = {
    **{f"model.lora.{name}": _RANK for name in ("alpha", "targets", "also_train", "dropout", "rslora")},
    "parallel.cp_outer": {"parallel.cp": 2},
    "parallel.dp": {"train.micro_batch_size": 2},
    "data.look_ahead": {"data.mode": "packed"},
    # each needs the other
    "pattern.anneal.widen": {"pattern.anneal.widen": 4.0, "pattern.anneal.widen_steps": 4},
    "pattern.anneal.widen_steps": {"pattern.anneal.widen": 4.0, "pattern.anneal.widen_steps": 4},
    # which has no effect on its own
    **{
        option: {"evaluate.every": 3, "evaluate.data": "text"}
        for option in OTHER
        if option.startswith("evaluate.")
    },
}


def config_with(tmp_path: Path, changes: dict[str, Any]) -> Config:
    raw = raw_config(tmp_path / "run", tmp_path / "data")
    (tmp_path / "table.json").write_text("[]")
    for option, value in changes.items():
        section, _, name = option.rpartition(".")
        node = raw
        for part in section.split(".") if section else []:
            node = node.setdefault(part, {})
        if name == "*":
            node.update(value)
        elif option == "pattern.name":  # which has other options
            raw["pattern"] = {"name": value, "block_size": 16}
        elif option == "data.sources":  # in place of a path
            raw["data"] = {"sources": value}
        else:
            node[name] = str(tmp_path / value) if name == "table" else value
    return parse_config(raw)


def test_every_option_has_a_rule_and_every_rule_an_option() -> None:
    assert {*declared_options(Config), *OPEN} == set(POLICIES)
    assert set(OTHER) == set(POLICIES), "this test needs another value of each option"


def test_no_section_hides_where_options_are_not_looked_for() -> None:
    """A section that may be absent, or one in a list, would have options without a rule."""

    def inner(annotation: Any) -> set[Any]:
        found = {
            part
            for part in typing.get_args(annotation)
            if isinstance(part, type) and issubclass(part, BaseModel)
        }
        return found.union(*(inner(part) for part in typing.get_args(annotation)))

    def walk(model: type[BaseModel]) -> set[Any]:
        found = set()
        for info in model.model_fields.values():
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                found |= walk(info.annotation)
            else:
                found |= inner(info.annotation)
        return found

    assert walk(Config) == {PatternChoice, SourceSection}  # layer_patterns and data.sources, compared whole


@pytest.mark.parametrize("option", list(POLICIES))
def test_a_change_is_treated_as_its_rule_says(tmp_path: Path, option: str) -> None:
    base = TOGETHER.get(option, {})
    then = flat_options(config_with(tmp_path, base))
    now = config_with(tmp_path, {**base, option: OTHER[option]})
    manifest = Manifest(step=DONE, world=1, shapes={}, options=then)
    name = "pattern.top_p" if option == "pattern.*" else option
    assert then[name] != flat_options(now)[name]
    rule = policy(name).rule
    if rule == "refused":
        with pytest.raises(
            UserError, match=rf"is of another run: {name}: .* -> .*checkpoint.allow=\[{name}\]"
        ):
            check_options(now, tmp_path, manifest)
        lifted = {**base, option: OTHER[option], "checkpoint.allow": [name]}
        found = check_options(config_with(tmp_path, lifted), tmp_path, manifest)
    else:
        found = check_options(now, tmp_path, manifest)
    changed = [change for change in found if change.option == name]
    if rule in ("told", "refused"):
        assert [(c.old, c.new, c.step) for c in changed] == [(then[name], flat_options(now)[name], DONE + 1)]
    else:
        assert found == []


def test_a_pattern_named_anew_compares_the_options_both_have(tmp_path: Path) -> None:
    then = flat_options(config_with(tmp_path, {}))
    raw = raw_config(tmp_path / "run", tmp_path / "data")
    now = parse_config({**raw, "pattern": {"name": "dense", "block_size": 32}})
    found = check_options(now, tmp_path, Manifest(step=DONE, world=1, shapes={}, options=then))
    assert [str(change) for change in found] == [
        "pattern.name: vertical_slash -> dense",
        "pattern.block_size: 16 -> 32",
    ]


def test_a_default_written_out_is_no_change(tmp_path: Path) -> None:
    then = flat_options(config_with(tmp_path, {}))
    now = config_with(tmp_path, {"pattern.*": {"max_columns": 4096}, "train.betas": [0.9, 0.95]})
    assert check_options(now, tmp_path, Manifest(step=DONE, world=1, shapes={}, options=then)) == []


def test_another_table_under_the_same_name_is_a_change(tmp_path: Path) -> None:
    now = config_with(tmp_path, {"pattern.table": "table.json"})
    then = flat_options(now)
    (tmp_path / "table.json").write_text("[1]")
    found = check_options(now, tmp_path, Manifest(step=DONE, world=1, shapes={}, options=then))
    assert [change.option for change in found] == ["pattern.table"]


def test_a_change_that_held_indices_keep_from_taking_effect(tmp_path: Path) -> None:
    """Frozen indices: refused. Held for n steps: from the next estimate on."""
    for refresh, first in (({"frozen_at": 3}, None), ({"frozen_at": 4}, 4), ({"every_n": 5}, 6)):
        then = flat_options(config_with(tmp_path, {"pattern.refresh": refresh}))
        now = config_with(tmp_path, {"pattern.refresh": refresh, "pattern.*": {"top_p": 0.5}})
        manifest = Manifest(step=DONE, world=1, shapes={}, options=then)
        if first is None:
            with pytest.raises(
                UserError, match=r"pattern.top_p: 0.8 -> 0.5 cannot take effect: .* of step 3"
            ):
                check_options(now, tmp_path, manifest)
        else:
            assert [change.step for change in check_options(now, tmp_path, manifest)] == [first]


def test_options_that_the_checkpoint_does_not_know_are_left_aside(tmp_path: Path) -> None:
    manifest = Manifest(step=DONE, world=1, shapes={}, options={"train.seed": 0, "train.gone": 1})
    assert check_options(config_with(tmp_path, {}), tmp_path, manifest) == []


@pytest.mark.parametrize(
    "name", ["data", "data.path", "model", "model.rope", "model.config.hidden_act", "train.seed"]
)
def test_names_that_lift_a_refusal(tmp_path: Path, name: str) -> None:
    assert config_with(tmp_path, {"checkpoint.allow": [name]}).checkpoint.allow == (name,)


@pytest.mark.parametrize("name", ["modle", "train.lr", "model.rop", "everything"])
def test_names_that_lift_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UserError,
        match=rf"checkpoint.allow: '{name}' names no option .* data.path, data.sources, model.rope,",
    ):
        config_with(tmp_path, {"checkpoint.allow": [name]})


def test_the_page_has_the_table_of_today() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_table(text), "run: python -m mtraining.train.policy docs/resume.md"
    assert text.count("\n| `") == len(POLICIES)
