"""Published MDS shards of token ids: read through mosaicml-streaming, decoded, encoded for another tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_cases import chat_tokenizer
from mds_folders import needs_streaming, packed, write_mds
from prepared import stopped_at_write, tree

from docs_pages import page_commands
from mtraining.data import PrepareOptions, PrepareSummary, TokenShards, prepare
from mtraining.errors import UserError
from mtraining.inputs import hub

BOOK, CODE, SHORT = "Call me Ishmael. " * 8, "def f():\n    return '☃'\n" * 6, "tiny"


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    """The tokenizer that the published ids are of: byte-level BPE with a beginning and an end of text."""
    made = chat_tokenizer(None)
    made.save_pretrained(tmp_path / "llama")
    return made


def ids(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def published(folder: Path, tokenizer: Any, **options: Any) -> Path:
    """ProLong in small: a folder a domain, rows of one long document or of several packed ones."""
    write_mds(folder / "book", [packed("book", ids(tokenizer, BOOK + str(n))) for n in range(3)], **options)
    rows = [packed("code", ids(tokenizer, CODE), ids(tokenizer, SHORT)), packed("code", ids(tokenizer, CODE))]
    write_mds(folder / "code", rows, **options)
    return folder


def run(source: Path | str, out: Path, **options: Any) -> PrepareSummary:
    return prepare(PrepareOptions((str(source),), out, **options), progress=False)


def texts(out: Path) -> dict[str, str]:
    """Documents of the byte tokenizer."""
    return {name: bytes(ids[:-1].tolist()).decode() for name, ids in TokenShards(out).documents()}


@needs_streaming
@pytest.mark.parametrize("compression", [None, "zstd", "gz", "br", "snappy", "bz2"])
def test_domains_are_decoded_and_encoded_again(tmp_path: Path, llama: Any, compression: str | None) -> None:
    source = published(tmp_path / "prolong", llama, compression=compression, size_limit=700, hashes=["xxh64"])
    before = tree(source)
    assert len([name for name in before if name.startswith("book/shard")]) > 1
    summary = run(source, tmp_path / "out", ids_tokenizer=str(tmp_path / "llama"))
    assert texts(tmp_path / "out") == {
        **{f"book:{n}": BOOK + str(n) for n in range(3)},
        "code:0.0": CODE,
        "code:0.1": SHORT,
        "code:1": CODE,
    }
    assert all(ids[-1] == 256 for _, ids in TokenShards(tmp_path / "out").documents())
    assert f"read as token ids: 6 documents of '{tmp_path / 'llama'}', encoded again" in summary.render()
    assert not summary.skipped and tree(source) == before


@needs_streaming
def test_lengths_are_of_the_model_s_tokens(tmp_path: Path, llama: Any) -> None:
    """Full length is what a sequence needs: its tokens and the label of the last."""
    source = published(tmp_path / "prolong", llama)
    full = len(CODE.encode()) + 1
    summary = run(source, tmp_path / "out", ids_tokenizer=str(tmp_path / "llama"), min_length=full)
    assert list(texts(tmp_path / "out")) == ["code:0.0", "code:1"]
    assert {entry.name: entry.reason for entry in summary.skipped} == dict.fromkeys(
        ["book:0", "book:1", "book:2", "code:0.1"], f"shorter than --min-length {full}"
    )
    assert len(BOOK + "0") + 1 < full <= len(BOOK.encode()) + 100


@needs_streaming
def test_one_domain_and_one_tokenizer(tmp_path: Path, llama: Any) -> None:
    """Ids of the model's own tokenizer are taken as they are, with its separators."""
    source = published(tmp_path / "prolong", llama)
    run(source / "book", tmp_path / "out", tokenizer=str(tmp_path / "llama"))
    made = {name: found.tolist() for name, found in TokenShards(tmp_path / "out").documents()}
    assert made == {f"book:{n}": ids(llama, BOOK + str(n)) for n in range(3)}


@needs_streaming
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_goes_on(tmp_path: Path, llama: Any, workers: int) -> None:
    source = published(tmp_path / "prolong", llama)
    options = {"ids_tokenizer": str(tmp_path / "llama"), "shard_tokens": 150}
    run(source, tmp_path / "whole", **options)
    with stopped_at_write(7):
        run(source, tmp_path / "parts", **options)
    assert run(source, tmp_path / "parts", **options, workers=workers).reused_shards > 0
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


@needs_streaming
def test_a_dataset_of_the_hub(tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    here = published(tmp_path / "prolong", llama)
    asked = []

    def download(repository: str, *, repo_type: str, allow_patterns: list[str] | None) -> str:
        asked.append((repository, repo_type, allow_patterns))
        return str(here)

    monkeypatch.setattr(hub, "_ask", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    options = {"kind": "mds", "ids_tokenizer": str(tmp_path / "llama")}
    run("owner/prolong/code", tmp_path / "one", **options)
    assert texts(tmp_path / "one")["owner/prolong/code:1"] == CODE
    run("owner/prolong", tmp_path / "all", **options)
    assert list(texts(tmp_path / "all")) == [
        *(f"book:{n}" for n in range(3)),
        "code:0.0",
        "code:0.1",
        "code:1",
    ]
    assert asked == [
        ("owner/prolong", "dataset", ["code/*"]),
        ("owner/prolong", "dataset", None),
    ]
    with pytest.raises(UserError, match="source 'owner/prolong/wiki' holds no index.json of MDS shards"):
        run("owner/prolong/wiki", tmp_path / "none", **options)


@needs_streaming
def test_a_cut_within_a_character_leaves_no_mark(tmp_path: Path) -> None:
    snow = list("☃ and ☃".encode())
    write_mds(tmp_path / "mds", [packed("x", snow[1:-1])])
    run(tmp_path / "mds", tmp_path / "out", ids_tokenizer="byte")
    assert list(texts(tmp_path / "out").values()) == [" and "]


@needs_streaming
def test_bad_rows_are_named(tmp_path: Path) -> None:
    good = packed("x", [1, 2, 3])
    rows = [
        {**good, "indices": np.array([[0, 4]], np.uint32)},
        {**good, "indices": np.array([[2, 2]], np.uint32)},
        {**good, "indices": np.array([0, 3], np.uint32)},
        {**good, "input_ids": np.array([5, 999], np.uint32), "indices": np.array([[0, 2]], np.uint32)},
        packed("x", [256, 257]),
        good,
    ]
    write_mds(tmp_path / "mds", rows)
    with pytest.raises(
        UserError, match="'mds:3' holds token id 999, .*'byte' .*; name by --ids-tokenizer the one"
    ):
        run(tmp_path / "mds", tmp_path / "none", ids_tokenizer="byte")
    summary = run(tmp_path / "mds", tmp_path / "out", ids_tokenizer="byte", bad_rows="skip")
    assert summary.documents == 1
    assert {entry.name: entry.reason for entry in summary.skipped} == {
        **{f"mds:{n}": "indices are not beginnings and ends within the row" for n in range(3)},
        "mds:3": "holds token ids that 'byte' does not have",
        "mds:4": "empty",  # special tokens alone
    }


@needs_streaming
def test_other_columns(tmp_path: Path) -> None:
    """Texts and names are read as of any rows; a mask of trained tokens is not, and that is told."""
    write_mds(tmp_path / "texts", [{"text": "words", "id": 7}], {"text": "str", "id": "int"})
    run(tmp_path / "texts", tmp_path / "out", name_column="id")
    assert texts(tmp_path / "out") == {"7": "words"}
    ready = {"input_ids": np.array([1, 2], np.uint32), "mask": np.array([0, 1], np.uint8)}
    write_mds(tmp_path / "masked", [ready], {"input_ids": "ndarray:uint32", "mask": "ndarray:uint8"})
    summary = run(tmp_path / "masked", tmp_path / "ids")
    assert "mask beside token ids, which is not read: all tokens are trained" in summary.render()
    with pytest.raises(UserError, match="--ids-column: 'text' holds text, not token ids"):
        run(tmp_path / "texts", tmp_path / "none", ids_column="text")


@needs_streaming
def test_pickles_are_refused(tmp_path: Path) -> None:
    write_mds(tmp_path / "mds", [{"input_ids": [1, 2]}], {"input_ids": "pkl"})
    with pytest.raises(UserError, match="has a column of pickles, which can run code when they are read"):
        run(tmp_path / "mds", tmp_path / "out")


@needs_streaming
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_damaged_shards_are_named(tmp_path: Path, compression: str | None) -> None:
    rows = [packed("x", [n, *range(65, 90)]) for n in range(66, 96)]
    write_mds(tmp_path / "mds", rows, size_limit=700, compression=compression)
    shards = sorted(file for file in (tmp_path / "mds").glob("shard.*"))
    per_shard = json.loads((tmp_path / "mds" / "index.json").read_text())["shards"][0]["samples"]
    shards[1].write_bytes(shards[1].read_bytes()[:7])
    summary = run(tmp_path / "mds", tmp_path / "out")
    assert [(entry.name, entry.reason) for entry in summary.skipped] == [
        (f"mds:{per_shard}-{2 * per_shard - 1}", "unreadable MDS shard")
    ]
    assert list(texts(tmp_path / "out"))[per_shard] == f"mds:{2 * per_shard}"
    (tmp_path / "mds" / "index.json").write_text('{"shards": [{"format": "mds", "version": 2}]}')
    with pytest.raises(UserError, match="has a damaged index.json"):
        run(tmp_path / "mds", tmp_path / "none")


@needs_streaming
def test_files_beside_domains_are_left_aside(tmp_path: Path) -> None:
    write_mds(tmp_path / "all" / "a", [packed("a", [65])])
    (tmp_path / "all" / "notes.txt").write_text("words")
    summary = run(tmp_path / "all", tmp_path / "out")
    assert [(e.name, e.reason) for e in summary.left_aside] == [("notes.txt", "beside folders of MDS shards")]


def test_without_the_library_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mds").mkdir()
    (tmp_path / "mds" / "index.json").write_text('{"shards": [{"format": "mds"}]}')
    monkeypatch.delitem(sys.modules, "streaming", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match=r"mosaicml-streaming, which is not installed; run: pip install 'mtraining\[mds\]' and then pip "
        r"install --no-deps mosaicml-streaming$",
    ):
        run(tmp_path / "mds", tmp_path / "out")


def test_an_index_of_something_else_is_no_mds(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[]")
    (tmp_path / "a.txt").write_text("words")
    assert run(tmp_path, tmp_path.parent / f"{tmp_path.name}-out").documents == 1
    with pytest.raises(UserError, match="holds no index.json of MDS shards"):
        run(tmp_path, tmp_path.parent / f"{tmp_path.name}-none", kind="mds")
    with pytest.raises(UserError, match="source '/tmp/no/such/folder' does not exist; correct the path"):
        run("/tmp/no/such/folder", tmp_path.parent / f"{tmp_path.name}-none", kind="mds")
    with pytest.raises(UserError, match="is a file, but --kind is 'mds'"):
        run(tmp_path / "a.txt", tmp_path.parent / f"{tmp_path.name}-none", kind="mds")


def test_ids_of_other_rows_are_decoded_too(tmp_path: Path, llama: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input_ids": ids(llama, BOOK)}) + "\n")
    run(tmp_path / "rows.jsonl", tmp_path / "out", ids_tokenizer=str(tmp_path / "llama"))
    assert list(texts(tmp_path / "out").values()) == [BOOK]
    with pytest.raises(UserError, match=r"other options \(--ids-tokenizer was '.*llama', now None\)"):
        run(tmp_path / "rows.jsonl", tmp_path / "out")
    (tmp_path / "a.txt").write_text("words")
    told = run(tmp_path / "a.txt", tmp_path / "text", ids_tokenizer="byte").render()
    assert "no token ids: --ids-tokenizer byte had nothing to decode" in told


@needs_streaming
def test_the_pages_command(tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtraining.cli import main

    [command] = [line for line in page_commands("data.md") if "prolong/book" in line]
    rows = [
        packed("book", ids(llama, str(n) * length)) for n, length in enumerate([8192, 8192, 9, 9, 9000, 9])
    ]
    write_mds(tmp_path / "prolong" / "book-524288", rows)
    (tmp_path / "llama").rename(tmp_path / "llama-3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with contextlib.suppress(SystemExit):
        main()
    assert {name: len(text) for name, text in texts(Path("data/books")).items()} == {
        "book-524288:0": 8192, "book-524288:4": 9000}  # fmt: skip


@needs_streaming
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-3b-512k", "llama3.1-8b-512k"])
def test_the_commands_of_the_recipes(
    tmp_path: Path, llama: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are written, with local folders where the hub's would be, and full lengths."""
    import huggingface_hub

    from mtraining.cli import main
    from mtraining.data import SequenceDataset, save_byte_tokenizer, tokenizer
    from mtraining.train.config import load_config

    recipe = Path(__file__).parents[2] / "recipes" / f"{name}.yaml"
    comments = re.sub(r" \\\n#", "", recipe.read_text())
    [command] = re.findall(r"^#\s+(mtraining prepare .*)$", comments, flags=re.MULTILINE)
    config = load_config(recipe)
    full = config.train.seq_len
    # every digit is one token of both tokenizers
    for domain in ("book-524288", "thestackv1_concat_by_repo-524288", "wiki"):
        rows = [packed(domain, llama.encode("12" * (full // 2)))] * 5
        rows[4] = packed(domain, llama.encode("1" * (full - 1)))
        write_mds(tmp_path / "hub" / domain, rows)
    named = {"Qwen/Qwen2.5-3B": "qwen"}
    save_byte_tokenizer(tmp_path / "qwen")
    known = tokenizer._load_fast
    monkeypatch.setattr(tokenizer, "_load_fast", lambda name: known(str(tmp_path / named.get(name, "llama"))))
    monkeypatch.setattr(hub, "_ask", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "hub"))
    monkeypatch.setattr(sys, "argv", [word if word != "16" else "1" for word in shlex.split(command)])
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        main()
    dataset = SequenceDataset(config.data.path, full, mode=config.data.mode)
    assert len(dataset) == 2  # of each domain the first row; the fifth is one token short
    (source,) = dataset.sources
    assert [name for name, _ in source.shards.documents()] == [
        "princeton-nlp/prolong-data-512K/thestackv1_concat_by_repo-524288:0",
        "princeton-nlp/prolong-data-512K/book-524288:0",
    ]
    reasons = {entry["reason"] for entry in source.shards.meta["skipped"]}
    assert reasons == {f"shorter than --min-length {full + 1:,}"}
