"""What a resumed run goes on from: the same run, whole, and one line of training a folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import raw_config, run_job, tiny_config

import mtraining.train.loop as loop
from distributed import ProcessPool, Worker
from mtraining.data import PrepareOptions, prepare
from mtraining.errors import UserError
from mtraining.train.config import load_config, parse_config
from mtraining.train.digest import damage
from mtraining.train.export import export_run
from mtraining.train.metrics import read_metrics, read_records
from mtraining.train.store import CheckpointStore, problem, read_manifest


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A finished run of six steps, with checkpoints after steps 3 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    loop.train(tiny_config(folder, shards))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- options of the optimizer ------------------------------------------------------------------------------------------


def test_changed_options_hold_are_told_and_written_down(
    run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[torch.optim.Optimizer] = []
    build = loop.build_optimizer
    monkeypatch.setattr(loop, "build_optimizer", lambda *args: kept.append(build(*args)) or kept[-1])
    new = {"weight_decay": 50.0, "betas": [0.5, 0.6], "eps": 1e-3, "steps": 8}
    loop.train(tiny_config(run, shards, train=new))
    for group, decay in zip(kept[0].param_groups, (50.0, 0.0), strict=True):
        assert (group["weight_decay"], group["betas"], group["eps"]) == (decay, (0.5, 0.6), 1e-3)
    out = capsys.readouterr().out
    assert "train.weight_decay: 0.0 -> 50.0 from step 7 on" in out.splitlines()
    assert "train.betas: [0.9, 0.95] -> [0.5, 0.6] from step 7 on" in out.splitlines()
    records = {record["option"]: record for record in read_records(run / "changes.jsonl")}
    assert records.keys() == {"train.weight_decay", "train.betas", "train.eps", "train.steps"}
    assert records["train.eps"] == {"step": 7, "option": "train.eps", "old": 1e-8, "new": 1e-3, "after": 6}
    assert load_config(run / "config.yaml").train.weight_decay == 50.0
    assert read_manifest(CheckpointStore(run).path(8)).options["train.weight_decay"] == 50.0


def test_a_larger_weight_decay_changes_the_steps_after_the_resume_only(run: Path, shards: Path) -> None:
    """Decay of 50 at lr 1e-2 halves every matrix at each step: the second step after the resume sees another loss."""
    plain = Path(shutil.copytree(run, run.parent / "plain"))
    for folder, decay in ((plain, 0.0), (run, 50.0)):
        new = {"steps": 8, "schedule": "constant", "weight_decay": decay}
        loop.train(tiny_config(folder, shards, train=new))
    before, after = losses(read_metrics(plain)), losses(read_metrics(run))
    assert before[:7] == after[:7]
    assert abs(before[7] - after[7]) > 0.1


def test_changes_that_no_checkpoint_has_seen_are_written_once(run: Path, shards: Path) -> None:
    """A run that dies before its next checkpoint and is started again makes the same change again."""
    again = tiny_config(run, shards, train={"steps": 7, "eps": 1e-3})
    loop.train(again)
    shutil.rmtree(CheckpointStore(run).path(7))
    loop.train(again)
    options = [record["option"] for record in read_records(run / "changes.jsonl")]
    assert sorted(options) == ["train.eps", "train.steps"]


def test_master_weights_may_change_their_dtype(run: Path, shards: Path) -> None:
    raw = raw_config(run, shards, train={"steps": 7})
    raw["model"]["dtype"] = "bfloat16"
    loop.train(parse_config(raw))
    raw["model"]["dtype"], raw["train"]["steps"] = "float32", 9
    loop.train(parse_config(raw))
    records = read_records(run / "changes.jsonl")
    dtypes = [(r["step"], r["old"], r["new"]) for r in records if r["option"] == "model.dtype"]
    assert dtypes == [(7, "float32", "bfloat16"), (8, "bfloat16", "float32")]
    assert losses(read_metrics(run))[-1] < losses(read_metrics(run))[0]


# -- whose checkpoint it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": {"hidden_act": "relu"}}, r"model.config.hidden_act: silu -> relu"),
        (
            {"rope": {"type": "linear", "factor": 4.0}, "config": {"max_position_embeddings": 64}},
            r"model.rope.factor: null -> 4.0; model.rope.rope_type: default -> linear",
        ),
        ({"rope": {"theta": 5e5}}, r"model.rope.rope_theta: 10000.0 -> 500000.0"),
        ({"config": {"rms_norm_eps": 1e-3}}, r"model.config.rms_norm_eps: 1e-06 -> 0.001"),
        ({"seed": 1}, r"model.seed: 0 -> 1"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_another_model_is_refused_by_what_differs(
    run: Path, shards: Path, change: dict[str, Any], sentence: str
) -> None:
    raw = raw_config(run, shards, train={"steps": 7})
    for key, value in change.items():
        raw["model"][key] = {**raw["model"].get(key, {}), **value} if isinstance(value, dict) else value
    if "rope" in change:  # as the first run had it: 256 positions are the model's own
        raw["model"]["config"].setdefault("max_position_embeddings", 256)
    before = contents(run)
    with pytest.raises(UserError, match=sentence) as refused:
        loop.train(parse_config(raw))
    assert "checkpoint.allow=[" in str(refused.value) and "\n" not in str(refused.value)
    assert contents(run) == before


def test_another_model_goes_on_for_who_means_it(
    run: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = raw_config(run, shards, train={"steps": 7}, checkpoint={"allow": ["model.config.hidden_act"]})
    raw["model"]["config"]["hidden_act"] = "relu"
    loop.train(parse_config(raw))
    assert "model.config.hidden_act: silu -> relu from step 7 on" in capsys.readouterr().out
    assert {"step": 7, "option": "model.config.hidden_act", "old": "silu", "new": "relu", "after": 6} in (
        read_records(run / "changes.jsonl")
    )
    with pytest.raises(UserError, match="model.config.hidden_act: silu -> relu"):
        export_run(run, run / "out", checkpoint="step_00000006")
    assert not (run / "out").exists()


def other_corpus(folder: Path, shards: Path) -> Path:
    """A corpus of documents of the same number and the same lengths, but for one character."""
    sources = folder / "text"
    sources.mkdir(parents=True)
    for path in shards.parent.glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        (sources / path.name).write_text(text[:400] + "x" + text[401:], encoding="utf-8")
    prepare(PrepareOptions(sources=(str(sources),), out=folder / "shards", kind="text"), progress=False)
    return folder / "shards"


def test_other_data_are_refused_until_they_are_allowed(run: Path, tmp_path: Path, shards: Path) -> None:
    other = other_corpus(tmp_path / "other", shards)
    before = contents(run)
    with pytest.raises(
        UserError, match=r"data.path: 3 documents of 3,903 tokens \(content \w+\) -> 3 documents"
    ):
        loop.train(tiny_config(run, other, train={"steps": 7}))
    assert contents(run) == before
    loop.train(tiny_config(run, other, train={"steps": 7}, checkpoint={"allow": ["data"]}))
    assert "data.path" in [record["option"] for record in read_records(run / "changes.jsonl")]


def test_moved_data_are_the_same_data(run: Path, tmp_path: Path, shards: Path) -> None:
    moved = shutil.copytree(shards, tmp_path / "moved")
    loop.train(tiny_config(run, Path(moved), train={"steps": 7}))
    assert [record["option"] for record in read_records(run / "changes.jsonl")] == ["train.steps"]


def test_data_prepared_before_digests_were_kept_are_known_all_the_same(
    run: Path, tmp_path: Path, shards: Path
) -> None:
    older = Path(shutil.copytree(shards, tmp_path / "older"))
    meta = json.loads((older / "meta.json").read_text())
    del meta["content"]
    (older / "meta.json").write_text(json.dumps(meta))
    loop.train(tiny_config(run, older, train={"steps": 7}))
    assert [record["option"] for record in read_records(run / "changes.jsonl")] == ["train.steps"]


def test_a_checkpoint_of_before_all_this_is_used_with_a_warning(
    run: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = CheckpointStore(run).path(6) / "manifest.json"
    raw = json.loads(path.read_text())
    order = ("train.seq_len", "train.batch_size", "train.seed", "data.mode")
    raw["data"] = {name: value for name, value in raw["options"].items() if name in order}
    raw["files"] = {name: record["bytes"] for name, record in raw["files"].items()}
    for name in ("options", "model", "corpus", "digest"):
        del raw[name]
    path.write_text(json.dumps(raw))
    loop.train(tiny_config(run, shards, train={"steps": 7}))
    out = capsys.readouterr().out
    assert "was written before digests, model and data were kept" in out
    assert "step_00000006 (step 6)" in out
    with pytest.raises(UserError, match="train.seed: 0 -> 4"):
        loop.train(tiny_config(run, shards, train={"steps": 9, "seed": 4}))


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int, harm: str) -> None:
    data = bytearray(path.read_bytes())
    if harm == "a bit":
        data[at] ^= 4
    elif harm == "200 bytes":
        data[at : at + 200] = bytes(byte ^ 255 for byte in data[at : at + 200])
    else:
        data[at : at + 4096] = bytes(4096)
    path.write_bytes(data)


HARMS = [
    ("__0_0.distcp", 600_000, "a bit"),
    ("__0_0.distcp", 600_000, "200 bytes"),
    ("__0_0.distcp", 600_000, "4 KiB zeroed"),
    ("__0_0.distcp", 10, "a bit"),
    (".metadata", 5_000, "a bit"),
    (".metadata", 0, "200 bytes"),
    ("manifest.json", 9, "a bit"),
    ("manifest.json", 3_000, "a bit"),
]


@pytest.mark.parametrize(("name", "at", "harm"), HARMS)
def test_every_kind_of_damage_is_seen(run: Path, name: str, at: int, harm: str) -> None:
    path = CheckpointStore(run).path(6)
    files = read_manifest(path).files
    assert problem(path) is None and damage(path, files, list(files)) is None
    flip(path / name, at, harm)
    if name == "manifest.json":
        assert problem(path) == "its manifest.json is damaged"
    else:
        assert damage(path, files, list(files)) == f"{name} is not what was written"


@pytest.mark.parametrize(("name", "at", "harm"), [HARMS[2], HARMS[4], HARMS[6]])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(
    finished: Path, run: Path, shards: Path, capsys: pytest.CaptureFixture[str], name: str, at: int, harm: str
) -> None:
    flip(CheckpointStore(run).path(6) / name, at, harm)
    loop.train(tiny_config(run, shards))
    out = capsys.readouterr().out
    reason = "its manifest.json is damaged" if name == "manifest.json" else f"{name} is not what was written"
    assert f"checkpoint {CheckpointStore(run).path(6)}: {reason}" in out
    assert "MB checked in" in out
    assert f"resuming from {CheckpointStore(run).path(3)} (step 3)" in out
    assert losses(read_metrics(run)) == losses(read_metrics(finished))
    assert (run / "checkpoints" / "left_behind_1" / "step_00000006").is_dir()
    assert CheckpointStore(run).complete() == [CheckpointStore(run).path(3), CheckpointStore(run).path(6)]


def test_a_damaged_checkpoint_asked_for_by_name_is_refused(run: Path, shards: Path) -> None:
    store = CheckpointStore(run)
    flip(store.path(6) / "__0_0.distcp", 600_000, "a bit")
    named = tiny_config(run, shards, train={"steps": 7}, checkpoint={"resume": "step_00000006"})
    sentence = (
        r"step_00000006 is damaged \(__0_0.distcp is not what was written\); the newest complete one is .*03"
    )
    with pytest.raises(UserError, match=sentence):
        loop.train(named)
    with pytest.raises(UserError, match=sentence):
        export_run(run, run / "out")


def test_where_none_can_be_used_the_run_does_not_begin_again_in_silence(run: Path, shards: Path) -> None:
    store = CheckpointStore(run)
    for step in (3, 6):
        flip(store.path(step) / ".metadata", 100, "a bit")
    with pytest.raises(
        UserError, match=r"none of the checkpoints there can be used; .* remove .*checkpoints to begin"
    ):
        loop.train(tiny_config(run, shards))


def test_each_rank_digests_what_it_writes(tmp_path: Path, pool: ProcessPool, shards: Path) -> None:
    raw = raw_config(
        tmp_path / "run", shards, parallel={"cp": 2}, train={"steps": 4}, checkpoint={"every": 2}
    )
    expected = losses(pool.run(run_job, world=2, raw=raw)[0])
    store = CheckpointStore(tmp_path / "run")
    files = read_manifest(store.path(4)).files
    assert files.keys() == {"__0_0.distcp", "__1_0.distcp", ".metadata"}
    assert all(len(record.digest) == 32 for record in files.values())
    flip(store.path(4) / "__1_0.distcp", 100_000, "a bit")
    assert losses(pool.run(run_job, world=2, raw=raw)[0]) == expected
    assert (store.folder / "left_behind_1" / "step_00000004").is_dir()


def refused_job(worker: Worker, raw: dict[str, Any]) -> str:
    try:
        run_job(worker, raw)
    except UserError as error:
        return str(error)
    return "it went on"


def test_all_ranks_refuse_alike(tmp_path: Path, pool: ProcessPool, shards: Path) -> None:
    raw = raw_config(
        tmp_path / "run", shards, parallel={"cp": 2}, train={"steps": 2}, checkpoint={"every": 2}
    )
    pool.run(run_job, world=2, raw=raw)
    raw["model"]["config"]["hidden_act"] = "relu"
    first, second = pool.run(refused_job, world=2, raw=raw)
    assert first == second
    assert "model.config.hidden_act: silu -> relu" in first


# -- going back --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Eight steps, saved at every second one."""
    folder = tmp_path_factory.mktemp("eight") / "run"
    loop.train(tiny_config(folder, shards, train={"steps": 8}, checkpoint={"every": 2, "keep_last": 9}))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_going_back_sets_the_later_line_aside(
    eight: Path, tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(eight, tmp_path / "run"))
    store, aside = CheckpointStore(run), run / "checkpoints" / "left_behind_1"
    later = contents(store.path(8)).values()
    back = {"every": 2, "keep_last": 2, "resume": "step_00000002"}
    loop.train(tiny_config(run, shards, train={"steps": 4, "lr": 2e-2}, checkpoint=back))
    out = capsys.readouterr().out
    assert "leaves step_00000004, step_00000006, step_00000008 behind: moved to " in out
    assert names(store.folder) == ["left_behind_1", "step_00000002", "step_00000004"]
    assert names(aside) == [
        "changes.jsonl", "metrics.jsonl", "step_00000004", "step_00000006", "step_00000008",
    ]  # fmt: skip
    assert list(contents(aside / "step_00000008").values()) == list(later)
    before = read_metrics(eight)
    assert read_metrics(aside) == before[2:]
    here = read_metrics(run)
    assert [record["step"] for record in here] == [1, 2, 3, 4]
    assert here[:2] == before[:2] and here[3]["loss"] != before[3]["loss"]
    loop.train(
        tiny_config(run, shards, train={"steps": 6, "lr": 2e-2}, checkpoint={"every": 2, "keep_last": 2})
    )
    assert f"resuming from {store.path(4)} (step 4)" in capsys.readouterr().out
    assert names(store.folder) == ["left_behind_1", "step_00000004", "step_00000006"]


def test_the_line_left_behind_can_be_gone_on_from(eight: Path, tmp_path: Path, shards: Path) -> None:
    run = Path(shutil.copytree(eight, tmp_path / "run"))
    store = CheckpointStore(run)
    every = {"every": 2, "keep_last": 9}
    loop.train(tiny_config(run, shards, train={"steps": 4}, checkpoint={**every, "resume": "step_00000002"}))
    again = {**every, "resume": "left_behind_1/step_00000006"}
    loop.train(tiny_config(run, shards, train={"steps": 8}, checkpoint=again))
    assert names(store.folder) == ["left_behind_1", "left_behind_2", "step_00000008"]
    assert names(store.folder / "left_behind_2") == [
        "changes.jsonl", "metrics.jsonl", "step_00000002", "step_00000004",
    ]  # fmt: skip
    assert losses(read_metrics(run)) == losses(read_metrics(eight))[6:]


def test_going_on_from_another_folder_mixes_nothing(eight: Path, run: Path, shards: Path) -> None:
    """The folder has a run of its own, of which not even the first steps belong to the new line."""
    store = CheckpointStore(run)
    branch = {"every": 2, "keep_last": 1, "resume": str(CheckpointStore(eight).path(4))}
    loop.train(tiny_config(run, shards, train={"steps": 8}, checkpoint=branch))
    assert names(store.folder) == ["left_behind_1", "step_00000008"]
    assert names(store.folder / "left_behind_1") == ["metrics.jsonl", "step_00000003", "step_00000006"]
    assert [record["step"] for record in read_metrics(run)] == [5, 6, 7, 8]
    assert losses(read_metrics(run)) == losses(read_metrics(eight))[4:]


@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("resume", ["auto", "step_00000006"])
def test_fewer_steps_than_are_done(run: Path, shards: Path, steps: int, resume: str) -> None:
    before = contents(run)
    asked = tiny_config(run, shards, train={"steps": steps}, checkpoint={"export": True, "resume": resume})
    with pytest.raises(
        UserError, match=rf"train.steps={steps}, and step 6 is there already \(.*step_00000006\)"
    ):
        loop.train(asked)
    assert contents(run) == before
