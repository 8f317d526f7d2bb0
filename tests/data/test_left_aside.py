"""Folders are read whole, through compression and whatever the case of a suffix; what is left aside is told by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtraining.data import PrepareOptions, PrepareSummary, TokenShards, prepare
from mtraining.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def run(source: Path, **options: Any) -> tuple[dict[str, str], PrepareSummary]:
    """({document name: text}, summary)."""
    out = source.parent / "out"
    summary = prepare(PrepareOptions(sources=(str(source),), out=out, **options), progress=False)
    return {name: bytes(ids[:-1].tolist()).decode() for name, ids in TokenShards(out).documents()}, summary


def row(text: str) -> str:
    return json.dumps({"text": text})


def aside(summary: PrepareSummary) -> dict[str, str]:
    return {entry.name: entry.reason for entry in summary.left_aside}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "in"
    made.mkdir()
    return made


def test_rows_and_text_in_any_case_and_compression(folder: Path) -> None:
    (folder / "a.jsonl").write_text(row("a") + "\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(row("b").encode()))
    (folder / "c.json").write_text(f"[{row('c')}, {row('cc')}]")
    (folder / "d.txt").write_text("d")
    (folder / "E.JSONL").write_text(row("e"))
    documents, summary = run(folder)
    assert documents == {
        "E.JSONL:1": "e",
        "a.jsonl:1": "a",
        "b.jsonl.gz:1": "b",
        "c.json:0": "c",
        "c.json:1": "cc",
        "d.txt": "d",
    }
    assert summary.left_aside == [] and summary.skipped == []


def test_text_in_any_case_but_nothing_hidden_or_without_a_suffix(folder: Path) -> None:
    for name in ("a.txt", "B.TXT", "c.text", "README", ".hid.txt"):
        (folder / name).write_text(name)
    documents, summary = run(folder)
    assert list(documents) == ["B.TXT", "a.txt", "c.text"]
    assert aside(summary) == {"README": "no suffix that is read", ".hid.txt": "hidden"}
    told = summary.render()
    assert (
        "left aside 1 (no suffix that is read): README" in told and "left aside 1 (hidden): .hid.txt" in told
    )
    meta = json.loads((folder.parent / "out" / "meta.json").read_text())
    assert {entry["name"] for entry in meta["left_aside"]} == {"README", ".hid.txt"}
    assert aside(run(folder)[1]) == aside(summary)  # told again by a finished folder


def test_text_beside_parquet_is_read_too(folder: Path) -> None:
    (folder / "a.txt").write_text("a")
    pq.write_table(pa.table({"text": ["b"]}), folder / "b.parquet")
    documents, summary = run(folder)
    assert documents == {"a.txt": "a", "b.parquet:0": "b"} and summary.left_aside == []


def test_a_readme_beside_rows_is_no_document(folder: Path) -> None:
    (folder / "README.md").write_text("about the rows")
    (folder / "a.jsonl").write_text(row("a"))
    documents, summary = run(folder)
    assert list(documents) == ["a.jsonl:1"]
    assert aside(summary) == {"README.md": "about the folder, beside rows"}


def test_a_kind_leaves_the_others_aside_by_name(folder: Path) -> None:
    (folder / "a.txt").write_text("a")
    (folder / "b.jsonl").write_text(row("b"))
    documents, summary = run(folder, kind="text")
    assert list(documents) == ["a.txt"] and aside(summary) == {"b.jsonl": "not of --kind text"}


def test_code_suffixes_in_any_case_and_no_hidden_file(folder: Path) -> None:
    for name in ("A.PY", "b.R", ".secret.py", "package.json", "notes.md"):
        (folder / name).write_text("x = 1\n")
    documents, summary = run(folder)
    assert list(documents) == ["A.PY", "b.R"]
    assert aside(summary) == {
        ".secret.py": "hidden",
        "notes.md": "not source code",
        "package.json": "not source code",
    }


def test_what_cannot_be_entered_or_opened_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "a.txt").write_text("a")
    (folder / ".git").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "lost.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.txt")  # to read it would wait for ever
    (folder / "b.parquet.gz").write_bytes(b"")
    documents, summary = run(folder)
    assert list(documents) == ["a.txt"]
    assert aside(summary) == {
        ".git/": "hidden",
        "link/": "links to folders",
        "lost.txt": "broken links and special files",
        "pipe.txt": "broken links and special files",
        "b.parquet.gz": "no suffix that is read",
    }


def test_rows_of_equal_files_in_two_folders_keep_their_names_apart(folder: Path) -> None:
    for name in ("x", "y"):
        (folder / name).mkdir()
        (folder / name / "part.jsonl").write_text(row(name))
    assert run(folder)[0] == {"x/part.jsonl:1": "x", "y/part.jsonl:1": "y"}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files(folder: Path, suffix: str) -> None:
    """Two streams one after another are one file, as every one of these formats has it."""
    pack = COMPRESS[suffix]
    (folder / f"a.txt{suffix}").write_bytes(pack("é".encode()) + pack(b"b"))
    (folder / f"B.JSONL{suffix.upper()}").write_bytes(
        pack((row("one") + "\n").encode()) + pack(row("two").encode())
    )
    (folder / f"c.json{suffix}").write_bytes(pack(f"[{row('c')}]".encode()))
    documents, _ = run(folder, workers=2)
    name = f"B.JSONL{suffix.upper()}"
    assert documents == {
        f"{name}:1": "one",
        f"{name}:2": "two",
        f"a.txt{suffix}": "éb",
        f"c.json{suffix}:0": "c",
    }


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damaged_compressed_files_are_named(folder: Path, suffix: str) -> None:
    lines = "".join(f"{row(str(n) * 50)}\n" for n in range(20_000)).encode()
    packed = COMPRESS[suffix](lines)
    (folder / f"cut.jsonl{suffix}").write_bytes(packed[: len(packed) // 2])
    (folder / f"cut.txt{suffix}").write_bytes(packed[: len(packed) // 2])
    (folder / f"no.txt{suffix}").write_bytes(b"not compressed")
    (folder / "a.txt").write_text("a")
    documents, summary = run(folder)
    assert "a.txt" in documents
    reasons = {entry.name: entry.reason for entry in summary.skipped}
    for name in (f"cut.jsonl{suffix}, its rest", f"cut.txt{suffix}", f"no.txt{suffix}"):
        assert reasons[name] == f"damaged {suffix}"


@pytest.mark.parametrize(
    ("text", "names", "skipped"),
    [
        (f"[{row('a')},\n 7, {row('b')}]", ["x.json:0", "x.json:2"], {"x.json:1": "not a JSON object"}),
        (f"\n{row('a')}\n\n{row('b')}\n", ["x.json:1", "x.json:3"], {}),
        ('{\n "text":\n "a"\n}\n', ["x.json"], {}),
        (f"\ufeff[{row('a')}]", ["x.json:0"], {}),
        (f"broken\n{row('a')}\n", ["x.json:2"], {"x.json:1": "not valid JSON"}),
    ],
)
def test_json_of_every_form(folder: Path, text: str, names: list[str], skipped: dict[str, str]) -> None:
    (folder / "x.json").write_text(text, encoding="utf-8")
    documents, summary = run(folder)
    assert list(documents) == names
    assert {entry.name: entry.reason for entry in summary.skipped} == skipped


def test_a_broken_array_is_one_fault(folder: Path) -> None:
    (folder / "x.json").write_text(f"[\n{row('a')},\n{row('b')}\n")
    (folder / "y.txt").write_text("y")
    documents, summary = run(folder)
    assert list(documents) == ["y.txt"]
    assert [(entry.name, entry.reason) for entry in summary.skipped] == [("x.json", "not valid JSON")]


def test_nothing_to_read_names_what_is_there(folder: Path) -> None:
    for name in ("README", "x.bin", ".hidden.txt"):
        (folder / name).write_text(name)
    with pytest.raises(
        UserError, match=r"holds no \.txt .* among README, x\.bin, \.hidden\.txt; correct the path or --kind"
    ):
        run(folder)
    for name, fault in (("README", "has no suffix"), ("x.bin", "has suffix '.bin'")):
        with pytest.raises(UserError, match=f"{fault}.* set --kind"):
            run(folder / name)
    assert run(folder / "README", kind="text")[0] == {"README": "README"}
