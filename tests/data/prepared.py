"""Helpers of the data tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mtraining.data import writer as writer_module


def write_rows(path: Path, documents: Mapping[str, str]) -> Path:
    """A .jsonl file of {"id", "text"} rows."""
    path.write_text(
        "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in documents.items())
    )
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@contextmanager
def stopped_at_write(number: int) -> Iterator[None]:
    """`prepare` in this block is interrupted before it writes this file of shards, counted from 0."""
    real, calls = writer_module.write_atomic, iter(range(100))

    def stops(path: Path, fill: Any) -> None:
        if next(calls) == number:
            raise KeyboardInterrupt
        real(path, fill)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "write_atomic", stops)
        with pytest.raises(KeyboardInterrupt):
            yield


def save_llama_like(folder: Path, *, with_bos: bool) -> Path:
    """A tokenizer with <s> and </s>, which puts <s> before a text by itself or not."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "<|end|>": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
