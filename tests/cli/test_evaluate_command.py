"""`mtraining evaluate`: a tiny run judged by its own commands, alone and on two processes, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mtraining.cli import app
from mtraining.data import PrepareOptions, prepare
from mtraining.errors import UserError
from mtraining.train.config import parse_config
from mtraining.train.loop import train
from processes import run_command

pytestmark = pytest.mark.xdist_group("evaluate_run")
TEXT = " ".join(f"Sentence {number} fills the page." for number in range(400))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of the page, and a text."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    prepare(
        PrepareOptions(sources=(str(folder / "book.txt"),), out=folder / "shards", kind="text"),
        progress=False,
    )
    model = {
        "model_type": "qwen2", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
    }  # fmt: skip
    raw = {
        "output": str(folder / "runs" / "first"),
        "model": {"init": "random", "config": model},
        "data": {"path": str(folder / "shards")},
        "pattern": {"name": "vertical_slash", "block_size": 16, "top_p": None, "top_k_columns": 16, "slash_by": "block",
                    "slash_density": 0.2, "window": 8, "sinks": 4, "probe": 16},
        "layout": {"unit": 16},
        "train": {"seq_len": 1024, "steps": 1},
        "checkpoint": {"export": False, "async": False},
        "log": {"trackers": []},
        "distributed": {"device": "cpu"},
    }  # fmt: skip
    train(parse_config(raw))
    return folder


def invoke(home: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.chdir(home)
    return CliRunner().invoke(app, ["evaluate", *arguments, "--device", "cpu"])


def test_the_pages_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needle, perplexity and recall, dense beside sparse; a second call has nothing left to do."""
    asked = [
        "runs/first", "--suite", "needle", "--suite", "ppl", "--suite", "recall", "--lengths", "1k,2k", "--text",
        "book.txt", "--essays", "book.txt", "--attention", "dense", "--attention", "sparse", "--samples", "2",
    ]  # fmt: skip
    told = invoke(home, monkeypatch, *asked)
    assert told.exit_code == 0, (told.output, told.exception)
    lines = (home / "evaluation" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * (3 * 2 + 1 + 1)
    rows = json.loads((home / "evaluation" / "summary.json").read_text())["rows"]
    by_name = {(row["attention"], row["task"]): row["lengths"] for row in rows}
    dense, sparse = by_name["dense", "recall"], by_name["sparse", "recall"]
    assert dense["2048"]["recall"] == pytest.approx(1) and sparse["2048"]["recall"] < 0.9
    assert sparse["2048"]["density"] < 0.6 < dense["2048"]["density"]
    # An untrained model foresees bytes as well as chance does.
    assert 150 < by_name["dense", "ppl"]["1024"]["perplexity"] < 400
    assert "needle average" in told.output and "seed 42" in told.output
    assert len(list((home / "evaluation").glob("*.svg"))) == 6
    again = invoke(home, monkeypatch, *asked)
    assert again.exit_code == 0
    assert (home / "evaluation" / "results.jsonl").read_text().splitlines() == lines


def test_a_dry_run_tells_the_memory_of_the_longest_length(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["runs/first", "--suite", "needle", "--lengths", "1k,2k", "--essays", "book.txt", "--batch", "4"]
    asked += ["--attention", "dense", "--attention", "sparse", "--out", str(tmp_path / "out"), "--dry-run"]
    told = invoke(home, monkeypatch, *asked)
    assert told.exit_code == 0, (told.output, told.exception)
    said = " ".join(told.output.split())
    assert "runs/first, dense: needle needle_" in said and "runs/first, sparse: needle needle_" in said
    # Twice 16 numbers in fp32 for each of 2,048 tokens, 2 layers, one kv head and 4 prompts.
    assert "1 process, 2K tokens" in said and "keys and values │ 2.00 MiB" in said
    assert not (tmp_path / "out").exists()
    page = "runs/first --suite ppl --text book.txt --lengths 2k --nproc 2 --dry-run --memory-gib 80"
    losses = invoke(home, monkeypatch, *page.split())
    assert "runs/first, dense: ppl, 2 processes, 2K tokens" in " ".join(losses.output.split())
    assert "keys and values" not in losses.output and "fits into 80.0 GiB" in losses.output
    wrong = invoke(home, monkeypatch, *asked, "--memory-gib", "1")
    assert isinstance(wrong.exception, UserError) and "a prompt of" in str(wrong.exception)
    longer = invoke(home, monkeypatch, *asked, "--lengths", "4k")
    assert "beyond the 2048 positions of the model" in str(longer.exception)


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks with answers of different lengths together, dense and sparse."""
    asked = [
        "runs/first",
        "--suite",
        "needle",
        "--suite",
        "infinitebench",
        "--tasks",
        "needle_words,passkey,math_find",
    ]
    asked += [
        "--lengths",
        "900,1k",
        "--samples",
        "2",
        "--essays",
        "book.txt",
        "--dtype",
        "float64",
        "--no-chart",
    ]
    asked += ["--attention", "dense", "--attention", "sparse"]
    found = []
    for batch in ("1", "4"):
        told = invoke(home, monkeypatch, *asked, "--batch", batch, "--out", f"batch{batch}")
        assert told.exit_code == 0, (told.output, told.exception)
        lines = [
            json.loads(line) for line in (home / f"batch{batch}" / "results.jsonl").read_text().splitlines()
        ]
        for line in lines:
            del line["prefill_seconds"], line["decode_seconds"]
        found.append(sorted(lines, key=lambda line: json.dumps(line, sort_keys=True)))
    assert len(found[0]) == 2 * 2 * 3 * 2 and found[0] == found[1]


def test_results_of_another_model_are_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = ["runs/first", "--suite", "ppl", "--text", "book.txt", "--lengths", "100", "--out", str(out)]
    assert invoke(home, monkeypatch, *asked).exit_code == 0
    noted = json.loads((out / "run.json").read_text())
    noted["models"]["runs/first"] = "another"
    (out / "run.json").write_text(json.dumps(noted))
    told = invoke(home, monkeypatch, *asked)
    assert f"--out {out} holds results of another model called runs/first; give another folder." in str(
        told.exception
    )


@pytest.mark.slow
def test_two_processes_score_as_one(home: Path) -> None:
    common = [
        "--suite",
        "ppl",
        "--text",
        "book.txt",
        "--lengths",
        "1000",
        "--device",
        "cpu",
        "--dtype",
        "float64",
    ]
    command = [sys.executable, "-m", "mtraining.cli", "evaluate", "runs/first", *common]
    run_command([*command, "--out", "one"], cwd=home)
    run_command([*command, "--out", "two", "--nproc", "2"], cwd=home)
    one, two = (json.loads((home / name / "results.jsonl").read_text()) for name in ("one", "two"))
    assert one["nll"] == pytest.approx(two["nll"], rel=1e-12) and one["tokens"] == 999


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports
@pytest.mark.parametrize("task", ["passkey", "niah_single_2"])
def test_the_harness_has_a_runs_own_tokenizer_and_files(
    task: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's name is no tokenizer that the harness could load; its essays are this command's."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: make setup EXTRAS=dev,lm-eval")
    out = tmp_path / "out"
    asked = ["runs/first", "--suite", f"lm-eval:mtraining_{task}", "--lengths", "1k", "--samples", "2"]
    told = invoke(home, monkeypatch, *asked, "--essays", "book.txt", "--out", str(out))
    assert told.exit_code == 0, (told.output, told.exception)
    found = json.loads((out / "lm-eval.json").read_text())["runs/first"]["dense"]
    assert found[f"mtraining_{task}"]["1024,none"] == 0.0  # a random model finds nothing
    assert f"runs/first, dense: lm-eval mtraining_{task}: " in told.output


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--suite", "rouler"], "--suite 'rouler' is not known; choose of all, needle, ruler"),
        (["--suite", "ppl"], "--suite ppl reads text of your own; give it as --text"),
        (
            ["--suite", "needle", "--lengths", "4k"],
            "--lengths: 4096 tokens are beyond the 2048 positions of the model; ask for shorter ones, stretch",
        ),
        (["--suite", "needle", "--lengths", "many"], "--lengths 'many' is not a list of lengths"),
        (
            ["--suite", "ruler", "--tasks", "qa_1"],
            "task qa_1 asks questions of SQuAD 2.0, which is not here; give its development file as --squad FILE",
        ),
        (
            ["--suite", "infinitebench", "--tasks", "code_debug"],
            "xinrongzhang2022/InfiniteBench into a folder and give it as --infinitebench FOLDER, or leave the task out",
        ),
        (
            ["--suite", "ruler", "--squad", "nowhere.json"],
            "--squad nowhere.json does not exist; correct the path",
        ),
        (["--suite", "ruler", "--tasks", "vtt"], "--tasks 'vtt' is not a task of ruler"),
        (
            ["--suite", "needle", "--template", "chat"],
            "--template chat: this tokenizer has no chat template; use --template base, or a tokenizer with one",
        ),
        (
            ["--suite", "ppl", "--text", "book.txt", "--lengths", "2k", "--out", "x", "--bucket", "0"],
            "bucket",
        ),
        (["--suite", "needle", "--attention", "sprse"], "--attention 'sprse' is not known"),
        (
            ["--suite", "needle", "--lengths", "100"],
            "--lengths: task needle_numbers and its answer of 32 tokens do not fit into 100; use a longer length",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], sentence: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [] if "--lengths" in arguments else ["--lengths", "1k"]
    told = invoke(
        home, monkeypatch, "runs/first", "--essays", "book.txt", *lengths, "--out", "bad", *arguments
    )
    assert told.exit_code != 0
    said = str(told.exception) if isinstance(told.exception, UserError) else told.output
    assert sentence in " ".join(said.split())
