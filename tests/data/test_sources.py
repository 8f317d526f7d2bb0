"""Every kind of source, and what each does with what it cannot use."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtraining.data import PrepareOptions, PrepareSummary, TokenShards, prepare
from mtraining.errors import UserError


def run(tmp_path: Path, *sources: str | Path, **options: Any) -> tuple[dict[str, str], PrepareSummary]:
    """({document name: text}, summary) of a byte-tokenised preparation; checks the separators on the way."""
    options = {"out": tmp_path / "out", **options}
    summary = prepare(PrepareOptions(sources=tuple(map(str, sources)), **options), progress=False)
    documents = {}
    for name, ids in TokenShards(options["out"]).documents():
        assert ids[-1] == 256
        documents[name] = bytes(ids[:-1].tolist()).decode()
    assert len(documents) == summary.documents
    return documents, summary


def reasons(summary: PrepareSummary) -> dict[str, str]:
    return {entry.name: entry.reason for entry in summary.skipped}


def test_text_file(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes("\ufeffÉmile\r\nend".encode())
    documents, summary = run(tmp_path, tmp_path / "book.txt")
    assert documents == {"book.txt": "Émile\r\nend"}
    assert summary.tokens == len("Émile\r\nend".encode()) + 1
    assert summary.skipped == []


def test_text_folder_names_what_it_skips(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("bee")
    (folder / "a.txt").write_text("ay")
    (folder / "sub" / "c.md").write_text("sea")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\t")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "nul.txt").write_bytes(b"a\0b")
    (folder / "lost.txt").symlink_to(folder / "b.txt")
    documents, summary = run(tmp_path, folder)
    assert list(documents.items()) == [
        ("a.txt", "ay"),
        ("b.txt", "bee"),
        ("lost.txt", "bee"),
        ("sub/c.md", "sea"),
    ]
    expected = {
        "blank.txt": "empty",
        "empty.txt": "empty",
        "latin.txt": "not UTF-8 text",
        "nul.txt": "binary (NUL bytes)",
    }
    assert reasons(summary) == expected
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert {entry["name"]: entry["reason"] for entry in meta["skipped"]} == expected
    assert meta["skipped_counts"] == {"empty": 2, "not UTF-8 text": 1, "binary (NUL bytes)": 1}
    for name in expected:
        assert name in summary.render()


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        b'{"text": "one"}',
        b"",
        b'{"text": ',
        b'{"text": ""}',
        b'{"text": null}',
        b'{"other": 1}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b"[1]",
        b'{"text": "two"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    documents, summary = run(tmp_path, tmp_path / "x.jsonl")
    assert documents == {"x.jsonl:1": "one", "x.jsonl:10": "two"}
    assert reasons(summary) == {
        "x.jsonl:3": "not valid JSON",
        "x.jsonl:4": "empty",
        "x.jsonl:5": "text is not a string",
        "x.jsonl:6": "no text column",
        "x.jsonl:7": "not UTF-8 text",
        "x.jsonl:8": "not valid JSON",
        "x.jsonl:9": "not a JSON object",
    }


def test_jsonl_columns(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"content": "one", "key": 7}\n')
    documents, _ = run(tmp_path, tmp_path / "x.jsonl", text_column="content", name_column="key")
    assert documents == {"7": "one"}
    with pytest.raises(UserError, match="--text-column: 'contents' is not there .* set it to 'content'$"):
        run(tmp_path, tmp_path / "x.jsonl", text_column="contents", out=tmp_path / "other")
    with pytest.raises(
        UserError, match="--name-column: 'keys' is not there .* set it to '(key|content)' or another of"
    ):
        run(tmp_path, tmp_path / "x.jsonl", text_column="content", name_column="keys", out=tmp_path / "other")
    assert not (tmp_path / "other").exists()  # nothing in the way of the corrected call


def test_parquet_with_a_corrupt_row_group_and_a_corrupt_file(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    table = pa.table({"text": ["alpha" * 50, "beta" * 50, "gamma" * 50, None], "n": [1, 2, 3, 4]})
    pq.write_table(table, folder / "a.parquet", row_group_size=1, compression="zstd", use_dictionary=False)
    data = bytearray((folder / "a.parquet").read_bytes())
    column = pq.ParquetFile(folder / "a.parquet").metadata.row_group(1).column(0)
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (folder / "a.parquet").write_bytes(data)
    (folder / "b.parquet").write_bytes(b"PAR1 no parquet")
    documents, summary = run(tmp_path, folder)
    assert documents == {"a.parquet:0": "alpha" * 50, "a.parquet:2": "gamma" * 50}
    assert reasons(summary) == {
        "a.parquet:1-1": "unreadable parquet row group",
        "a.parquet:3": "text is not a string",
        "b.parquet": "unreadable parquet",
    }
    with pytest.raises(UserError, match="--text-column: 'txt' is not there in .* set it to 'text'$"):
        run(tmp_path, folder / "a.parquet", text_column="txt", out=tmp_path / "other")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "code"
    for folder in ("zeta/inner", "alpha", ".git", "alpha/__pycache__"):
        (root / folder).mkdir(parents=True)
    (root / "zeta" / "inner" / "deep.c").write_text("int deep;")
    (root / "zeta" / "b.py").write_text("b = 1\n")
    (root / "alpha" / "a.py").write_text("a = 1\n")
    (root / "alpha" / "__init__.py").write_text("")
    (root / "alpha" / "bad.py").write_bytes(b"# caf\xe9")
    (root / "alpha" / "logo.png").write_bytes(b"\0")
    (root / "alpha" / "__pycache__" / "a.py").write_text("cached")
    (root / ".git" / "hook.py").write_text("hidden")
    (root / "setup.py").write_text("setup()")
    (root / "README.md").write_text("prose")
    return root


def test_code_by_folder(tmp_path: Path, repository: Path) -> None:
    documents, summary = run(tmp_path, repository)
    assert list(documents.items()) == [
        ("alpha", "# file: alpha/a.py\na = 1\n"),
        ("setup.py", "# file: setup.py\nsetup()\n"),
        ("zeta", "# file: zeta/b.py\nb = 1\n# file: zeta/inner/deep.c\nint deep;\n"),
    ]
    assert reasons(summary) == {"alpha/__init__.py": "empty", "alpha/bad.py": "not UTF-8 text"}
    assert {entry.name: entry.reason for entry in summary.left_aside} == {
        ".git/": "hidden",
        "README.md": "not source code",
        "alpha/__pycache__/": "caches and installed packages",
        "alpha/logo.png": "not source code",
    }
    assert "left aside 2 (not source code): README.md, alpha/logo.png" in summary.render()


def test_code_by_file_and_extension(tmp_path: Path, repository: Path) -> None:
    documents, _ = run(tmp_path, repository, group_by="file", extensions=("c", ".md"))
    assert list(documents) == ["README.md", "zeta/inner/deep.c"]
    assert documents["zeta/inner/deep.c"] == "# file: zeta/inner/deep.c\nint deep;\n"


def test_stdlib_is_long_code_without_tests(tmp_path: Path) -> None:
    documents, summary = run(tmp_path, "stdlib", max_documents=70)
    names = list(documents)
    assert names == sorted(names)
    assert "asyncio" in names and "argparse.py" in names
    assert documents["asyncio"].startswith("# file: asyncio/__init__.py\n")
    assert "# file: asyncio/base_events.py\n" in documents["asyncio"]
    source = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    assert documents["argparse.py"] == "# file: argparse.py\n" + source
    assert summary.documents == 70
    assert max(map(len, documents.values())) > 100_000
    assert not any(
        "/test/" in line for text in documents.values() for line in text.splitlines() if "# file: " in line
    )


def test_installed_packages(tmp_path: Path) -> None:
    documents, _ = run(tmp_path, "package:rich", group_by="file", max_documents=3)
    assert all(name.startswith("rich/") for name in documents)
    single, _ = run(tmp_path, "package:typing_extensions", out=tmp_path / "single")
    assert list(single) == ["typing_extensions.py"]
    for name in ("package:no_such_package", "package:no.such.package"):
        with pytest.raises(UserError, match=f"'{name}' is not installed"):
            run(tmp_path, name, out=tmp_path / "none")


def test_saved_hugging_face_dataset(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["one", "", "three"], "title": ["a", "b", "c"], "n": [1, 2, 3]})
    DatasetDict({"train": rows, "validation": rows.select([2])}).save_to_disk(tmp_path / "saved")
    documents, summary = run(tmp_path, tmp_path / "saved")
    assert documents == {"saved:0": "one", "saved:2": "three"}
    assert reasons(summary) == {"saved:1": "empty"}
    documents, _ = run(
        tmp_path, tmp_path / "saved", split="validation", name_column="title", out=tmp_path / "validation"
    )
    assert documents == {"c": "three"}
    with pytest.raises(UserError, match="split 'test' is not in .* train, validation"):
        run(tmp_path, tmp_path / "saved", split="test", out=tmp_path / "other")


# Older pandas, under datasets, leaves a finished file for the garbage collector to close.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)
def test_folder_through_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "train.csv").write_text("text,n\nfirst,1\nsecond,2\n")
    documents, _ = run(tmp_path, folder, kind="dataset")
    assert list(documents.values()) == ["first", "second"]


@pytest.mark.parametrize("name", ["someone/no-such-dataset", "missing_dataset"])
def test_unknown_hub_id_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UserError, match=f"source '{name}' is neither an existing path nor a Hugging Face dataset"
    ):
        run(tmp_path, name)


def test_several_sources_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    assert list(run(tmp_path, tmp_path / "b.txt", tmp_path / "a.jsonl")[0]) == ["b.txt", "a.jsonl:1"]


def test_bad_sources_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.py").write_text("a")
    (tmp_path / "mixed" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "x.bin").write_bytes(b"x")
    for source, options, message in [
        ("empty", {}, "holds no .txt .* file .* for it is empty; correct the path or --kind"),
        ("mixed", {}, r"holds source code \(a.py\) and rows \(a.jsonl\); set --kind"),
        ("x.bin", {}, "suffix '.bin', which names no kind"),
        ("x.bin", {"kind": "dataset"}, "is a file, but --kind is 'dataset'"),
        ("missing.txt", {}, "does not exist"),
        ("missing", {"kind": "code"}, "does not exist"),
        ("empty", {"kind": "code"}, "holds no source code"),
        ("empty", {"kind": "parquet"}, "holds no .parquet file"),
    ]:
        with pytest.raises(UserError, match=message):
            run(tmp_path, tmp_path / source, **options)
    assert not (tmp_path / "out").exists()


def test_nothing_usable_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"1 skipped, the first 'latin.txt' \(not UTF-8 text\)"):
        run(tmp_path, tmp_path / "latin.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "jsn"}, "kind 'jsn' is unknown; did you mean 'jsonl'"),
        ({"group_by": "flder"}, "did you mean 'folder'"),
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"max_tokens": -1}, "--max-tokens is -1"),
        ({"sources": ()}, "sources is empty"),
        ({"sources": "stdlib"}, "sources takes a list"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrepareOptions(**{"sources": ("stdlib",), "out": tmp_path, **options})
