"""Bad input through the command that people type: one sentence, exit code 2, and an earlier run left as it was."""

from __future__ import annotations

import errno
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import raw_config
from torch.distributed.checkpoint import FileSystemWriter

from mtraining.cli import main
from mtraining.data import PrepareOptions, prepare
from mtraining.train import launch
from mtraining.train.metrics import read_metrics
from mtraining.train.store import CheckpointStore

GEMMA = {
    "model_type": "gemma2",
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["full_attention", "full_attention"],
}


class Command:
    """`mtraining train` in this process: exit code, and what was told on stdout and stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, recipe: Path, *settings: str, nproc: int | None = None) -> tuple[int, str, str]:
        words = [word for setting in settings for word in ("--set", setting)]
        launch = [] if nproc is None else ["--nproc", str(nproc)]
        self.monkeypatch.setattr(sys, "argv", ["mtraining", "train", str(recipe), *words, *launch])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        told = self.capsys.readouterr()
        return code, told.out, told.err.strip()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def write_recipe(folder: Path, shards: Path, **sections: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_config(folder / "run", shards, **sections)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The folder of a recipe and its finished run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, shards, train={"steps": 2}, checkpoint={"every": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mtraining", "train", str(recipe)])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["train.seq_len=250"], r"seq_len: 250 .* the nearest length that works is 256"),
        (["train.seq_len=64", "parallel.cp=8"], r"too few .* 8 ranks with blocks of 16; use at least 128"),
        (["model.config.num_key_value_heads=3"], r"num_key_value_heads=3 does not divide .*=4; choose"),
        (
            ["model.config.model_type=qwen3", "model.config.head_dim=12"],
            r"head_dim=12, which is not supported; use a multiple of 8 from 16 to 256",
        ),
        (["train.seqlen=256"], r"unknown key train.seqlen in .*; did you mean train.seq_len\?"),
        (["modle.init=random"], r"unknown key modle in .*; did you mean model\?"),
        (["pattern.topp=0.5"], r"pattern.topp: .*did you mean 'top_p'"),
        (["model.config.num_hiden_layers=2"], r"num_hiden_layers is not a field .* 'num_hidden_layers'\?$"),
        (["model.config.model_type=qwen22"], r"model_type='qwen22' is not known; did you mean 'qwen2'\?$"),
        (["data.path=absent"], r"'absent' does not exist; run `mtraining prepare SOURCE absent` first"),
        (["data.path={empty}"], r"empty' has no meta.json; .* correct the path"),
        (
            ["data.path={short}"],
            r"has no document of train.seq_len 256 .* lower train.seq_len to at most 99,",
        ),
        (["model.config.vocab_size=100"], r"token id 256, outside the model's vocabulary of 100; prepare"),
        (
            [
                "model.config.use_sliding_window=true",
                "model.config.sliding_window=64",
                "model.config.max_window_layers=0",
            ],
            r"is of another run: model.config.layer_types: .*; model.config.sliding_window: null -> 64; .*; restore",
        ),
        (
            [f"model.config={GEMMA}"],
            r"gemma2 caps its attention scores \(attn_logit_softcapping=50.0\).*; use a model",
        ),
        (["model.config.attention_dropout=0.1"], r"\(attention_dropout=0.1\); set attention_dropout to 0"),
        (["model.config.intermediate_size=112"], r"is of another model: .*mlp.* \(64, 112\) here; use the"),
        (["checkpoint.resume=step_00000007"], r"step_00000007 does not exist; set checkpoint.resume to"),
        (["checkpoint.resume=step_00000001"], r"step_00000001 is half-written \(.*; the newest complete one"),
        (["parallel.cp=2"], r"needs 2 processes but 1 process was started; pass --nproc 2"),
        (["train.kernel=tritn"], r"kernel: 'tritn' is not known; choose one of auto, reference"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_sentence_and_nothing_lost(
    command: Command, trained: Path, tmp_path: Path, settings: list[str], sentence: str
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    half = next((tmp_path / "run" / "checkpoints" / "step_00000001").glob("*.distcp"))
    half.write_bytes(half.read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("x" * 99, encoding="utf-8")
    prepare(PrepareOptions(sources=(str(tmp_path / "short.txt"),), out=tmp_path / "short"), progress=False)
    before = contents(tmp_path)
    filled = [re.sub(r"\{(\w+)\}$", rf"{tmp_path}/\1", setting) for setting in settings]
    code, out, errors = command(trained / "recipe.yaml", f"output={tmp_path / 'run'}", *filled)
    assert code == 2, errors
    assert len(errors.splitlines()) == 1, errors
    assert errors.startswith("error: ")
    assert re.search(sentence, errors), errors
    assert "step 1/" not in out and "step 3/" not in out
    assert contents(tmp_path) == before


def test_a_half_written_last_checkpoint_is_told_and_the_one_before_is_used(
    command: Command, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    store = CheckpointStore(tmp_path / "run")
    half = next(store.path(2).glob("*.distcp"))
    half.write_bytes(half.read_bytes()[:100])
    code, out, errors = command(trained / "recipe.yaml", f"output={tmp_path / 'run'}")
    assert (code, errors) == (0, "")
    assert re.search(r"skipping half-written checkpoint .*step_00000002: .* has 100 of", out)
    assert re.search(r"resuming from .*step_00000001 \(step 1\)", out)
    assert store.complete() == [store.path(1), store.path(2)]
    assert read_metrics(tmp_path / "run")[1]["loss"] == read_metrics(trained / "run")[1]["loss"]


def test_a_loss_that_is_nan(command: Command, tmp_path: Path, shards: Path) -> None:
    """A real one: a learning rate of 1e20 makes the weights overflow in the second step."""
    recipe = write_recipe(tmp_path, shards, checkpoint={"every": 1})
    code, _, errors = command(recipe, "train.lr=1e20", "train.clip=null", "train.warmup_steps=0")
    assert code == 2
    assert len(errors.splitlines()) == 1
    store = CheckpointStore(tmp_path / "run")
    assert errors.startswith("error: step 2: the loss is nan on rank 0, in the batch of document 'count")
    assert f"the last checkpoint is {store.path(1)}: lower train.lr" in errors
    assert store.complete() == [store.path(1)]


def test_a_full_disk(
    command: Command, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    store = CheckpointStore(tmp_path / "run")
    before = contents(store.path(2))

    def refuse(self: FileSystemWriter, *_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileSystemWriter, "write_data", refuse)
    code, out, errors = command(trained / "recipe.yaml", f"output={tmp_path / 'run'}", "train.steps=3")
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert "checkpoint of step 3 was not saved" in out and "the disk is full" in out
    assert f"the last good checkpoint is {store.path(2)}: free space there and run the same command" in errors
    assert contents(store.path(2)) == before
    assert store.complete() == [store.path(1), store.path(2)]


def test_a_launcher_refuses_what_options_tell_and_starts_no_rank(
    command: Command, tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "run_processes", lambda *_: pytest.fail("ranks were started"))
    recipe = write_recipe(tmp_path, shards)
    code, _, errors = command(recipe, "parallel.cp=8", "train.seq_len=64", nproc=8)
    assert code == 2
    assert re.fullmatch(r"error: seq_len: 64 tokens are too few .*", errors)


@pytest.mark.slow
def test_ranks_tell_bad_data_once(command: Command, tmp_path: Path, shards: Path) -> None:
    recipe = write_recipe(tmp_path, shards)
    absent = tmp_path / "absent"
    code, _, errors = command(recipe, "parallel.cp=2", f"data.path={absent}", nproc=2)
    assert code == 2
    assert re.fullmatch(rf"error: dataset '{absent}' does not exist; .*", errors)
