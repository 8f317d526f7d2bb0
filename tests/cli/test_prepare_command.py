"""`mtraining prepare` as it is typed: every kind of source, and what it says of documents that it could not use."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from docs_pages import page_commands
from mtraining.cli import main
from mtraining.data import TokenShards
from mtraining.inputs import hub
from processes import run_command


def mtraining(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mtraining", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def documents(out: Path) -> dict[str, str]:
    return {name: bytes(ids[:-1].tolist()).decode() for name, ids in TokenShards(out).documents()}


@pytest.mark.parametrize("source", ["nothere", "./nothere", "owner/nothere"])
def test_a_mistyped_source_is_one_line(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "_ask", lambda *_: ConnectionError("no route"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert mtraining(monkeypatch, "prepare", source, tmp_path / "out") == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: source '{source}' ") and errors.count("\n") == 1
    assert ("does not exist" if source[0] == "." else "cannot be reached (no route)") in errors


def write_jsonl(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text('{"id": "a", "text": "one"}\n{"text": \n{"id": "b", "text": "two"}\n')
    return folder / "rows.jsonl"


def write_parquet(folder: Path) -> Path:
    table = pa.table({"id": ["a", "x", "b"], "text": ["one", None, "two"]})
    pq.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def write_folder(folder: Path) -> Path:
    (folder / "texts").mkdir()
    (folder / "texts" / "a").with_suffix(".txt").write_text("one")
    (folder / "texts" / "b.txt").write_text("two")
    (folder / "texts" / "empty.txt").write_text("")
    return folder / "texts"


@pytest.mark.parametrize(
    ("write", "options", "names", "skipped"),
    [
        (write_jsonl, ["--name-column", "id"], ["a", "b"], "rows.jsonl:2"),
        (write_parquet, ["--name-column", "id"], ["a", "b"], "x"),
        (write_folder, [], ["a.txt", "b.txt"], "empty.txt"),
    ],
)
def test_kinds_of_source(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: object,
    options: list[str],
    names: list[str],
    skipped: str,
) -> None:
    source = write(tmp_path)  # type: ignore[operator]
    assert mtraining(monkeypatch, "prepare", source, tmp_path / "out", *options) == 0
    assert documents(tmp_path / "out") == dict(zip(names, ("one", "two"), strict=True))
    told = capsys.readouterr().out
    assert skipped in told, told
    assert "2 documents" in told


def test_code_folder_with_holdout_and_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("aaa", "bbb", "ccc"):
        (tmp_path / "code" / package).mkdir(parents=True)
        (tmp_path / "code" / package / "main.py").write_text(f"# {package}\n")
        (tmp_path / "code" / package / "data.bin").write_bytes(b"\0")
    arguments = ("--kind", "code", "--holdout", "bbb", "--max-documents", "1", "--workers", "2")
    assert mtraining(monkeypatch, "prepare", tmp_path / "code", tmp_path / "out", *arguments) == 0
    assert [*documents(tmp_path / "out")] == ["aaa"]
    assert [*documents(tmp_path / "out" / "holdout")] == ["bbb"]
    assert "# aaa" in documents(tmp_path / "out")["aaa"]


def test_the_installed_command_and_a_second_run(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path)
    command = [sys.executable, "-m", "mtraining.cli", "prepare", str(source), str(tmp_path / "out")]
    first = run_command(command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = run_command(command)
    assert "2 documents" in first.stdout and "2 documents" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_the_pages_command_for_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [command] = [line for line in page_commands("data.md") if "chats.jsonl" in line]
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]},
        {"messages": [{"role": "user", "content": "hi" * 3000}, {"role": "assistant", "content": "Hello."}]},
        {"messages": []},
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' }}{{ m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    monkeypatch.chdir(tmp_path)
    assert mtraining(monkeypatch, *shlex.split(command)[1:]) == 0
    shards = TokenShards("data/chats")
    labels = shards.labels(np.arange(shards.num_tokens))
    assert bytes(shards.document(0).tolist()) == b"user: hi\nassistant: Hello.\n"
    assert bytes(labels[labels >= 0].tolist()) == b"Hello.\n"
    told = capsys.readouterr().out
    assert "skipped 1 (no messages): chats.jsonl:3" in told
    assert "skipped 1 (longer than --max-length 4,096): chats.jsonl:2" in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{t}/absent.jsonl", "{t}/out"], "does not exist; correct the path"),
        (["{t}/rows.jsonl"], "at least one source and the folder to write"),
        (["{t}/rows.jsonl", "{t}/out", "--kind", "jsn"], "did you mean 'jsonl'"),
        (["{t}/rows.jsonl", "{t}/out", "--text-column", "txt"], "--text-column: 'txt' is not there"),
        (
            ["{t}/rows.jsonl", "{t}/out", "--ids-column", "text"],
            "--ids-column: 'text' holds text, not token ids",
        ),
        (
            ["{t}/rows.jsonl", "{t}/out", "--add-bos"],
            "--add-bos: the byte tokenizer has no beginning-of-text token",
        ),
        (["{t}/rows.jsonl", "{t}/out", "--train-on", "asistant"], "did you mean 'assistant'"),
        (
            ["{t}/rows.jsonl", "{t}/out", "--bad-rows", "refuse"],
            "'rows.jsonl:2' cannot be used (not valid JSON)",
        ),
        (["{t}/rows.jsonl", "{t}/out", "--chat-template", "{t}/none"], "--chat-template"),
        (["{t}/rows.jsonl", "{t}/out", "--max-tokens", "0"], "--max-tokens is 0; it must be at least 1"),
        (["{t}/rows.jsonl", "{t}/out", "--tokenizer", "{t}/none"], "tokenizer"),
        (["{t}/rows.jsonl", "{t}/rows.jsonl/out"], "cannot be made: Not a directory; name another folder"),
        (["{t}/rows.jsonl", "/proc/none/out"], "cannot be made: No such file or directory; name another"),
    ],
)
def test_mistakes_get_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    write_jsonl(tmp_path)
    filled = [argument.replace("{t}", str(tmp_path)) for argument in arguments]
    assert mtraining(monkeypatch, "prepare", *filled) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: ") and sentence in errors
    assert len(errors.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
