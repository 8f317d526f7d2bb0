"""Columns of rows: hints that lead to one that can be read, and token ids that another program made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared import save_llama_like

from mtraining.data import PrepareOptions, PrepareSummary, TokenShards, prepare
from mtraining.errors import UserError

CHAT = {
    "messages": [{"role": "user", "content": "hi"}],
    "meta": {"text": "x"},
    "n": 1,
    "story": "once",
    "title": "t",
}


def write(folder: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(source: Path, **options: Any) -> tuple[dict[str, list[int]], PrepareSummary]:
    """({document name: ids}, summary)."""
    out = source.parent / "out"
    summary = prepare(PrepareOptions(sources=(str(source),), out=out, **options), progress=False)
    return {name: ids.tolist() for name, ids in TokenShards(out).documents()}, summary


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_hint_leads_to_text(tmp_path: Path, form: str) -> None:
    """Not to lists, mappings or numbers, however near their names."""
    source = write(tmp_path, form, [CHAT])
    for column, fault in (("message", "is not there"), ("messages", "holds conversations, not text"),
                          ("meta", "holds mappings, not text"), ("n", "holds numbers, .* not text")):  # fmt: skip
        with pytest.raises(
            UserError,
            match=rf"^--text-column: '{column}' {fault} in .*; set it to '(story|title)' or another of",
        ):
            run(source, text_column=column)
    with pytest.raises(UserError, match="^--name-column: 'messages' holds conversations, not names"):
        run(source, text_column="story", name_column="messages")
    assert run(source, text_column="story", name_column="n")[0]["1"] == [*b"once", 256]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_where_no_column_is_text_there_is_no_hint(tmp_path: Path, form: str) -> None:
    source = write(tmp_path, form, [{"words": [{"a": 1}], "n": 1}])
    with pytest.raises(
        UserError, match=r"no column holds text: there are words \(lists\), n \(numbers, .*\)$"
    ):
        run(source)


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_token_ids_are_taken_as_they_are(tmp_path: Path, form: str) -> None:
    """End-of-text once; nothing before them unless asked; they are the tokenizer's."""
    tokenizer = str(save_llama_like(tmp_path / "tokenizer", with_bos=True))
    source = write(tmp_path, form, [{"input_ids": [3, 4], "id": "a"}, {"input_ids": [1, 4, 2], "id": "b"}])
    documents, summary = run(source, tokenizer=tokenizer, name_column="id")
    assert documents == {"a": [3, 4, 2], "b": [1, 4, 2]}
    assert summary.ready_documents == 2 and "read as token ids: 2 documents" in summary.render()
    shards = TokenShards(tmp_path / "out")
    assert shards.meta["tokenizer"] == tokenizer and shards.vocab_size == 6


def test_a_beginning_is_put_before_text_and_on_request_before_ids(tmp_path: Path) -> None:
    tokenizer = str(save_llama_like(tmp_path / "tokenizer", with_bos=True))
    source = write(tmp_path, "jsonl", [{"input_ids": [3, 4]}, {"input_ids": [1, 4, 2]}])
    (tmp_path / "x.txt").write_text("a b")
    documents, summary = run(tmp_path / "x.txt", tokenizer=tokenizer)
    assert documents == {"x.txt": [1, 3, 4, 2]}
    assert (
        "each document ends with </s> (2) and begins with <s> (1), as the tokenizer does" in summary.render()
    )
    options = {"tokenizer": tokenizer, "add_bos": True}
    prepare(PrepareOptions(sources=(str(source),), out=tmp_path / "with", **options), progress=False)
    assert [ids.tolist() for _, ids in TokenShards(tmp_path / "with").documents()] == [
        [1, 3, 4, 2],
        [1, 4, 2],
    ]
    prepare(
        PrepareOptions(
            sources=(str(tmp_path / "x.txt"),), out=tmp_path / "without", tokenizer=tokenizer, add_bos=False
        ),
        progress=False,
    )
    assert [ids.tolist() for _, ids in TokenShards(tmp_path / "without").documents()] == [[3, 4, 2]]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("bad", [-1, 260, 70_000])
def test_ids_of_another_tokenizer_are_refused(tmp_path: Path, form: str, bad: int, workers: int) -> None:
    source = write(tmp_path, form, [{"input_ids": [1]}, {"input_ids": [5, bad]}])
    with pytest.raises(
        UserError,
        match=rf"document 'rows.{form}:\d' holds token id {bad}, which tokenizer 'byte' does not have; .*--tokenizer",
    ):
        run(source, workers=workers)
    assert not (tmp_path / "out").exists()


def test_rows_that_are_no_ids_are_skipped_by_name(tmp_path: Path) -> None:
    rows = [[1, 2], [], None, [1.5], ["a"], [[1]], [True], [2**70], "12", [3]]
    source = write(tmp_path, "jsonl", [{"input_ids": ids} for ids in rows] + [{"other": 1}])
    documents, summary = run(source)
    assert documents == {"rows.jsonl:1": [1, 2, 256], "rows.jsonl:10": [3, 256]}
    assert {entry.name: entry.reason for entry in summary.skipped} == {
        "rows.jsonl:2": "empty",
        **{f"rows.jsonl:{n}": "token ids are not a list of whole numbers" for n in range(3, 10)},
        "rows.jsonl:11": "no column of token ids",
    }


def test_null_ids_of_parquet_are_skipped(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        "parquet",
        [{"input_ids": [1]}, {"input_ids": None}, {"input_ids": [2, None]}, {"input_ids": []}],
    )
    documents, summary = run(source)
    assert list(documents) == ["rows.parquet:0"]
    assert [entry.name for entry in summary.skipped] == ["rows.parquet:1", "rows.parquet:2", "rows.parquet:3"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_text_comes_before_ids_and_that_is_told(tmp_path: Path, form: str) -> None:
    source = write(tmp_path, form, [{"text": "x", "input_ids": [1], "tokens": [7]}])
    documents, summary = run(source)
    assert list(documents.values()) == [[ord("x"), 256]]
    assert "input_ids beside text, which is read; --ids-column input_ids reads them" in summary.render()
    prepare(PrepareOptions(sources=(str(source),), out=tmp_path / "ids", ids_column="tokens"), progress=False)
    assert [ids.tolist() for _, ids in TokenShards(tmp_path / "ids").documents()] == [[7, 256]]


def test_a_wrong_column_of_ids_is_refused_with_a_right_one(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", [{"text": "x", "tokens": [7]}])
    with pytest.raises(
        UserError, match=r"^--ids-column: 'text' holds text, not token ids in .*; set it to 'tokens'$"
    ):
        run(source, ids_column="text")
    with pytest.raises(
        UserError, match=r"'body' is not there .*; set it to 'text'; or read token ids by --ids-column tokens"
    ):
        run(source, text_column="body")
    with pytest.raises(UserError, match="--text-column and --ids-column cannot both be read"):
        PrepareOptions(sources=("x",), out=tmp_path, text_column="body", ids_column="tokens")


def test_ids_of_a_saved_dataset(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]}).save_to_disk(
        tmp_path / "saved"
    )
    assert run(tmp_path / "saved")[0] == {"saved:0": [1, 2, 256], "saved:1": [3, 256]}


def test_ids_are_as_wide_as_the_largest(tmp_path: Path) -> None:
    """Eleven words, one of which is number 70,000: in 16 bits it would be stored as 4464."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {f"w{n}": n for n in range(9)} | {"</s>": 9, "far": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.txt").write_text("w1 far w2")
    documents, _ = run(tmp_path / "x.txt", tokenizer=str(tmp_path / "tokenizer.json"), eos_token="</s>")
    assert documents == {"x.txt": [1, 70_000, 2, 9]}
    assert TokenShards(tmp_path / "out").document(0).dtype == np.uint32


def test_an_id_that_does_not_fit_is_never_cut(tmp_path: Path) -> None:
    from mtraining.data.encoding import Encoded
    from mtraining.data.shards import token_dtype
    from mtraining.data.writer import ShardWriter

    assert token_dtype(2**16) == np.uint16 and token_dtype(2**16 + 1) == np.uint32
    writer = ShardWriter(tmp_path, token_dtype(100), 10)
    writer.add(Encoded("fits", np.array([2**16 - 1], np.uint32)))
    with pytest.raises(UserError, match="document 'far' has token id 65536"):
        writer.add(Encoded("far", np.array([2**16], np.uint32)))
