"""Plans: every arm is a configuration, arms differ in their attention alone, seeds take turns."""

from pathlib import Path
from typing import Any

import pytest

from mtraining.errors import UserError
from mtraining.train.config import parse_config

PLANS = ("extend.yaml", "learn.yaml")


@pytest.mark.parametrize(
    ("name", "size"), [*((name, size) for name in PLANS for size in ("", "smoke")), ("learn.yaml", "small")]
)
def test_every_arm_reads_and_differs_in_its_attention_alone(name: str, size: str, tmp_path: Path) -> None:
    from arms import read_plan

    plan = read_plan(name, size)
    assert "dense" in [arm.name for arm in plan.arms]
    shared: list[dict[str, Any]] = []
    for arm, seed in plan.runs():
        if seed:
            continue
        config = parse_config(plan.run_config(arm, seed, tmp_path)).model_dump(mode="json")
        for key in ("attention", "at_start"):
            config["evaluate"].pop(key)
        shared.append({key: v for key, v in config.items() if key not in ("output", "pattern", "layout")})
    assert all(config == shared[0] for config in shared)


def test_the_arms_that_the_question_needs_are_there() -> None:
    from arms import read_plan

    extend, learn = (read_plan(name) for name in PLANS)
    assert {arm.name for arm in extend.arms} >= {
        "dense", "recommended", "paper-95", "paper-90", "frozen", "coverage", "moba", "xattention", "dense-first",
        "dense-every", "widen",
    }  # fmt: skip
    assert {arm.name for arm in learn.arms} >= {"dense", "recommended", "frozen", "window", "coverage"}
    for name in ("dense", "recommended"):
        assert len(extend.arm(name).seeds) == 2
        assert len(learn.arm(name).seeds) == 5


def test_the_pilot_differs_in_rate_and_rope_alone(tmp_path: Path) -> None:
    from arms import read_plan

    pilot, extend = read_plan("pilot.yaml"), read_plan("extend.yaml")
    assert pilot.corpus == extend.corpus and pilot.measure == extend.measure
    found = {
        arm.name: parse_config(pilot.run_config(arm, seed, tmp_path)).model_dump(mode="json")
        for arm, seed in pilot.runs()
    }
    chosen = parse_config(extend.run_config(extend.arm("dense"), 0, tmp_path)).model_dump(mode="json")
    assert {config["pattern"]["name"] for config in found.values()} == {"dense"}
    assert (found["dense"]["train"]["lr"], found["dense"]["model"]) == (
        chosen["train"]["lr"],
        chosen["model"],
    )
    assert len({(config["train"]["lr"], str(config["model"]["rope"])) for config in found.values()}) == len(
        found
    )
    for config in [chosen, *found.values()]:
        config["output"] = config["model"]["rope"] = None
        config["train"] |= {"lr": 0, "steps": 0}
    assert all(config == chosen for config in found.values())
    assert read_plan("pilot.yaml", "smoke").config["train"]["seq_len"] == 1024


@pytest.mark.parametrize("name", [*PLANS, "pilot.yaml"])
def test_every_arm_of_the_plans_can_be_built(name: str, tmp_path: Path) -> None:
    """Beyond reading: what `mtraining train` refuses only when it makes the model."""
    from arms import read_plan

    read_plan(name).check(tmp_path)


def test_an_arm_that_cannot_be_built_is_refused_before_any_begins(
    study_main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus" / "held-out").mkdir(parents=True)
    given = ["run", str(tmp_path), "--plan", "learn.yaml", "--smoke", "--minutes", "1"]
    assert study_main.main([*given, "--set", "arms.window.set.model={rope: {type: none, factor: 2}}"]) == 2
    told = capsys.readouterr().err
    assert "error: plan learn-smoke, arm window: model.rope.factor has no effect with type=none" in told
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        (None, 2, ["0", "1", "0", "1", "0", "1"]),
        ("5, GPU-ab,7", 2, ["5", "GPU-ab", "5", "GPU-ab", "5", "GPU-ab"]),
        ("", 0, [None, None, None]),
    ],
)
def test_only_gpus_that_the_command_was_given_are_used(
    study_main: Any,
    given: str | None,
    gpus: int,
    expected: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert study_main.places(gpus, 3) == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=3 names fewer; name more, or lower --gpus"):
        study_main.places(2, 1)


def test_first_seeds_come_before_second_ones(tmp_path: Path) -> None:
    from arms import read_plan

    plan = read_plan("extend.yaml").chosen(["recommended", "moba", "dense"], None)
    assert [(arm.name, seed) for arm, seed in plan.runs()] == [
        ("recommended", 0), ("moba", 0), ("dense", 0), ("recommended", 1), ("dense", 1),
    ]  # fmt: skip
    assert len(plan.chosen([], 1).runs()) == 3
    config = plan.run_config(plan.arm("dense"), 1, tmp_path)
    assert config["train"]["seed"] == config["model"]["seed"] == 1


def test_bad_plans_and_options_are_one_sentence(tmp_path: Path) -> None:
    from arms import read_plan

    with pytest.raises(UserError, match="did you mean 'recommended'"):
        read_plan("extend.yaml").arm("recomended")
    with pytest.raises(
        UserError, match=r"nothing.yaml cannot be read; give one of extend.yaml, learn.yaml, pilot.yaml"
    ):
        read_plan("nothing.yaml")
    with pytest.raises(UserError, match="--small: .*extend.yaml does not say how to shrink itself"):
        read_plan("extend.yaml", "small")
    for override in ("trian.steps=4", "steps=4", "config.train.steps"):
        with pytest.raises(UserError, match=f"'{override}' is no part of extend.yaml"):
            read_plan("extend.yaml", overrides=[override])
    (tmp_path / "mine.yaml").write_text("arms: {}\nconfig: {}\n")
    with pytest.raises(UserError, match="misses corpus, measure"):
        read_plan(tmp_path / "mine.yaml")
    changed = read_plan("extend.yaml", overrides=["config.train.steps=4", "measure.samples=2"])
    assert changed.config["train"]["steps"] == 4 and changed.measure["samples"] == 2


def test_overrides_have_the_last_word(tmp_path: Path) -> None:
    from arms import read_plan

    for size in ("", "smoke"):
        plan = read_plan("extend.yaml", size, ["config.train.steps=7", "arms.moba.set.pattern.top_k=3"])
        assert plan.config["train"]["steps"] == 7
    small = read_plan("learn.yaml", "small", ["config.checkpoint.every=9"])
    assert small.config["checkpoint"]["every"] == 9 and small.name == "learn-small"
    assert small.arm("window").changes["pattern"]["window"] == 16, (
        "the arm's own number, not that of all arms"
    )
    assert (
        read_plan("extend.yaml", "", ["arms.moba.set.pattern.top_k=3"])
        .arm("moba")
        .changes["pattern"]["top_k"]
        == 3
    )


def test_a_study_remembers_its_plan(tmp_path: Path) -> None:
    from arms import read_plan, saved_plan

    assert saved_plan(tmp_path) is None
    plan = read_plan("learn.yaml", "small", ["config.train.steps=7"])
    plan.save(tmp_path)
    assert saved_plan(tmp_path) == plan


def test_runs_can_be_named_one_by_one() -> None:
    from arms import read_plan

    plan = read_plan("learn.yaml").chosen(["dense:1", "window:0", "dense:0"])
    assert [(arm.name, seed) for arm, seed in plan.runs()] == [("dense", 1), ("window", 0), ("dense", 0)]
    with pytest.raises(UserError, match="window stands beside runs of one seed; write window:0"):
        plan.chosen(["dense:1", "window"])
    with pytest.raises(UserError, match="--seeds has no effect"):
        plan.chosen(["dense:1"], 1)
    with pytest.raises(UserError, match="'windo' is not an arm"):
        plan.chosen(["windo:1"])


def test_the_script_for_gpus_names_runs_that_there_are() -> None:
    import re

    from arms import read_plan

    script = (Path(__file__).parents[2] / "recipes" / "study" / "two_gpus.sh").read_text()
    for name in PLANS:
        case = script.split(f"\n{name.removesuffix('.yaml')})\n")[1].split(";;")[0]
        runs = ",".join(re.findall(r"arms\+?=,?(\S+)", case)).split(",")
        plan = read_plan(name)
        assert len(runs) == len(set(runs)) >= 14
        assert plan.chosen(runs).runs()
        for run in runs:
            arm, _, seed = run.partition(":")
            assert int(seed) in plan.arm(arm).seeds
