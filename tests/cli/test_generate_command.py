"""`mtraining generate`: answers of a folder, of a run and of its checkpoints, alone and on processes of its own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from mtraining.cli import app
from mtraining.data import PrepareOptions, prepare
from mtraining.errors import UserError
from mtraining.generate import parse_attention
from mtraining.generate.attention import AttentionChoice
from mtraining.model import RopeOptions
from mtraining.pattern import Dense, VerticalSlash, build_pattern
from mtraining.train.config import parse_config
from mtraining.train.loop import train
from mtraining.train.named import find_model
from processes import run_command

pytestmark = pytest.mark.xdist_group("generate_run")

MODEL = {
    "model_type": "qwen2", "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
PATTERN = {"name": "vertical_slash", "block_size": 16, "top_p": 0.8, "window": 8, "sinks": 4, "probe": 16}
TOKENS = ["--max-new-tokens", "12", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of training, with a checkpoint after each, exported."""
    folder = tmp_path_factory.mktemp("run")
    text = folder / "text"
    text.mkdir()
    (text / "count.txt").write_text(" ".join(str(number) for number in range(900)), encoding="utf-8")
    prepare(PrepareOptions(sources=(str(text),), out=folder / "shards", kind="text"), progress=False)
    raw: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"init": "random", "config": MODEL},
        "data": {"path": str(folder / "shards")},
        "pattern": PATTERN,
        "layer_patterns": {0: {"name": "dense", "block_size": 16}},
        "layout": {"unit": 16},
        "train": {"seq_len": 256, "steps": 2, "batch_size": 2, "lr": 1e-2},
        "checkpoint": {"every": 1, "keep_last": 2, "export": True, "async": False},
        "log": {"trackers": []},
        "distributed": {"device": "cpu"},
    }
    return train(parse_config(raw)).run


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text(" ".join(str(number) for number in range(40)) + "\n", encoding="utf-8")
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], catch_exceptions=True)


def told(result: Result) -> str:
    """What the answer was; where there is none, the error."""
    assert result.exception is None, result.exception
    return result.stdout


def refused(*arguments: object) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, UserError), result.exception
    return str(result.exception)


def test_a_folder_a_run_and_its_checkpoint_are_the_same_model(run: Path, prompt: Path) -> None:
    newest = run / "checkpoints" / "step_00000002"
    answers = {
        name: told(invoke(name, "--prompt", prompt, *TOKENS)) for name in (run / "export", run, newest)
    }
    assert len(set(answers.values())) == 1 and len(answers[run]) > 3
    older = find_model(str(run / "checkpoints" / "step_00000001")).build("float32", torch.device("cpu"))
    named = find_model(str(run))
    assert named.checkpoint == newest
    first, last = (next(model.parameters()) for model in (older, named.build("float32", torch.device("cpu"))))
    assert not torch.equal(first, last)


def test_a_run_keeps_its_patterns_and_its_tokenizer(run: Path) -> None:
    named = find_model(str(run))
    assert named.patterns(2) == [Dense(block_size=16), build_pattern(**PATTERN)]
    assert parse_attention("sparse").patterns(named.patterns(2)) == named.patterns(2)
    assert named.tokenizer().decode(named.tokenizer()("7 8").input_ids, skip_special_tokens=True) == "7 8"
    assert find_model(str(run / "export")).patterns(2) is None


def test_several_prompts_and_what_they_cost(run: Path, prompt: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("1 2 3", encoding="utf-8")
    result = invoke(run, "--prompt", prompt, "--prompt", short, "--attention", "sparse", *TOKENS)
    alone = told(invoke(run, "--prompt", short, "--attention", "sparse", *TOKENS))
    assert told(result).startswith(f"== {prompt}\n") and told(result).endswith(f"== {short}\n{alone}")
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 2
    assert f"{prompt}: 109 tokens read in" in lines[0] and "(sparse, density " in lines[0]
    assert "12 new ones at" in lines[0] and "ended by length" in lines[0]


def test_a_stop_string_and_draws(run: Path, prompt: Path) -> None:
    whole = told(invoke(run, "--prompt", prompt, *TOKENS))
    stop = whole[3]
    assert told(invoke(run, "--prompt", prompt, "--stop", stop, *TOKENS)) == whole[: whole.index(stop)] + "\n"
    drawn = [
        told(invoke(run, "--prompt", prompt, "--temperature", 3, "--seed", seed, *TOKENS))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_processes_of_its_own_give_the_same_answer(run: Path, prompt: Path) -> None:
    options = ["--prompt", str(prompt), "--attention", "sparse", *TOKENS]
    alone = told(invoke(run, *options))
    command = [sys.executable, "-m", "mtraining.cli", "generate", str(run), *options]
    assert run_command([*command, "--nproc", "2", "--outer", "2"]).stdout == alone
    wrong = run_command([*command, "--nproc", "2", "--max-new-tokens", "1000"], code=2)
    assert wrong.stderr.count("error: ") == 1 and "beyond the 256 positions of the model" in wrong.stderr


@pytest.mark.slow
def test_torchrun_gives_the_same_answer(run: Path, prompt: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["mtraining.cli", "generate", str(run), "--prompt", str(prompt), *TOKENS]
    assert run_command(command).stdout == told(invoke(run, "--prompt", prompt, *TOKENS))


def test_what_cannot_be_answered_is_one_sentence(run: Path, prompt: Path, tmp_path: Path) -> None:
    empty, missing = tmp_path / "empty.txt", tmp_path / "missing.txt"
    empty.write_text("\n", encoding="utf-8")
    assert "is empty; write at least a word" in refused(run, "--prompt", empty)
    assert "cannot be read as text" in refused(run, "--prompt", missing)
    longer = refused(run, "--prompt", prompt, "--max-new-tokens", 200, "--device", "cpu")
    assert "the 109 tokens of prompt 0 and 200 new ones are beyond the 256 positions" in longer
    assert "rope.type yarn and a rope.factor of at least 1.21" in longer
    assert "--dtype half is not known" in refused(run, "--prompt", prompt, "--dtype", "half")
    assert "--device tpu is not known" in refused(run, "--prompt", prompt, "--device", "tpu")
    assert "--outer 2 does not divide the 1 processes" in refused(run, "--prompt", prompt, "--outer", 2)
    assert "is a run with rotary settings of its own" in refused(
        run, "--prompt", prompt, "--rope-type", "yarn"
    )
    assert "--rope-type spiral" in refused(run / "export", "--prompt", prompt, "--rope-type", "spiral")
    assert "is no model; give a Hugging Face folder" in refused(tmp_path, "--prompt", prompt)
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert "has no complete checkpoint" in refused(tmp_path, "--prompt", prompt)


def test_a_dry_run_tells_the_memory_and_answers_nothing(run: Path, prompt: Path) -> None:
    asked = (run, "--prompt", prompt, "--prompt", prompt, "--attention", "sparse", "--nproc", 2, "--dry-run")
    one = told(invoke(*asked))
    assert "2 processes, 2 of up to 109 tokens, sparse" in " ".join(one.split())
    assert "keys and values" in one and "parameters" in one and "needed" in one
    page = (run, "--prompt", prompt, "--nproc", 2, "--dry-run", "--memory-gib", 80)
    assert "fits into 80.0 GiB" in told(invoke(*page))
    sentence = refused(*asked, "--memory-gib", 1)
    assert sentence.startswith("a prompt of 109 tokens needs 2.50 GiB on each GPU (in the ")
    assert "use" in sentence and "more processes (--nproc, or torchrun), fewer prompts together" in sentence
    assert "add --dry-run, or leave it out" in refused(run, "--prompt", prompt, "--memory-gib", 1)


def test_positions_are_stretched_on_demand(run: Path, prompt: Path) -> None:
    arguments = (run / "export", "--prompt", prompt, "--max-new-tokens", 160, "--device", "cpu")
    assert "beyond the 256 positions" in refused(*arguments)
    result = invoke(*arguments, "--rope-type", "yarn")
    assert told(result) and "160 new ones" in result.stderr


def test_a_model_without_a_tokenizer(run: Path, prompt: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (run / "export").iterdir():
        if "token" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    assert "has no tokenizer; name one with --tokenizer" in refused(bare, "--prompt", prompt, *TOKENS)
    named = told(invoke(bare, "--prompt", prompt, "--tokenizer", run / "export", *TOKENS))
    assert named == told(invoke(run, "--prompt", prompt, *TOKENS))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dense", AttentionChoice("dense", Dense(), "zigzag")),
        ("sparse", AttentionChoice("sparse", None, "striped")),
        ("sparse:a_shape", AttentionChoice("sparse:a_shape", build_pattern("a_shape"), "striped")),
        (
            "sparse:vertical_slash,top_p=0.9,max_columns=512",
            AttentionChoice(
                "sparse:vertical_slash,top_p=0.9,max_columns=512",
                VerticalSlash(top_p=0.9, max_columns=512),
                "striped",
            ),
        ),
    ],
)
def test_attention_is_read(text: str, expected: AttentionChoice) -> None:
    assert parse_attention(text) == expected


def test_attention_from_a_table(tmp_path: Path) -> None:
    table = tmp_path / "patterns.yaml"
    patterns = {"all": {"name": "dense"}, "near": {"name": "a_shape"}}
    layers = [["all", "all"], ["near", "all"]]
    table.write_text(yaml.safe_dump({"patterns": patterns, "layers": layers}), encoding="utf-8")
    found = parse_attention(f"sparse:{table}").pattern
    assert isinstance(found, tuple) and len(found) == 2
    assert parse_attention("sparse").patterns() == VerticalSlash()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("full", "--attention 'full' is not known; use dense, sparse"),
        ("dense:moba", "--attention 'dense:moba' is not known"),
        ("sparse:", "--attention 'sparse:' is not known"),
        ("sparse:mooba", r"pattern: 'mooba' is not known \(did you mean 'moba'"),
        ("sparse:moba,top_k", "'top_k' is no option; write option=value"),
        ("sparse:moba,topk=3", "moba has no such option"),
        ("sparse:moba,top_k=[", "the value of top_k is not valid YAML"),
        ("sparse:nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_attention_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_attention(text)


def test_rope_options_are_checked(run: Path) -> None:
    with pytest.raises(UserError, match="rotary settings of its own"):
        find_model(str(run), RopeOptions(type="linear"))


def test_a_damaged_checkpoint_is_refused(run: Path, prompt: Path, tmp_path: Path) -> None:
    whole, copy = run / "checkpoints" / "step_00000002", tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.yaml", copy)
    damaged = Path(shutil.copytree(whole, copy / "checkpoints" / whole.name))
    shard = max(damaged.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "damaged" in refused(copy, "--prompt", prompt, *TOKENS)
