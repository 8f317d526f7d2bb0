"""The same rows through TRL's own preparation: equal ids and labels.

TRL is no dependency, so these run where it is installed. `test_chat.py` holds the same rules restated.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from chat_cases import (
    CHATML_MARKED,
    CONVERSATIONS,
    LLAMA3_MARKED,
    MISTRAL,
    THINKING,
    chat_tokenizer,
    unmarked,
)

from mtraining.data import PrepareOptions, TokenShards, prepare

pytestmark = pytest.mark.slow
sft = pytest.importorskip("trl.trainer.sft_trainer", reason="needs trl")


def theirs(tokenizer: Any, rows: list[dict[str, Any]], *, assistant_only: bool, completion_only: bool) -> Any:
    """[(input_ids, labels)] as the trainer prepares them."""
    from datasets import Dataset

    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=completion_only)
    options = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant_only,
        max_length=None,
        shuffle_dataset=False,
    )
    made = sft.SFTTrainer._prepare_dataset(
        trainer, Dataset.from_list(rows), tokenizer, options, False, None, "train"
    )
    return [(row["input_ids"], row["labels"]) for row in made]


def ours(folder: Path, tokenizer: Any, rows: list[dict[str, Any]], **options: Any) -> Any:
    from datasets import Dataset

    folder.mkdir()
    tokenizer.save_pretrained(folder / "tokenizer")
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    prepare(
        PrepareOptions(
            (str(folder / "rows.parquet"),),
            folder / "out",
            tokenizer=str(folder / "tokenizer"),
            bad_rows="refuse",
            **options,
        ),
        progress=False,
    )
    shards = TokenShards(folder / "out")
    spans = [
        np.arange(start, start + length) for start, length in zip(shards.starts, shards.lengths, strict=True)
    ]
    return [(shards.gather(span).tolist(), shards.labels(span).tolist()) for span in spans]


PLAIN = [{"messages": row["messages"]} for name, row in CONVERSATIONS.items() if "tool" not in name]
PAIRS = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in PLAIN[:3]]
TEXTS = [
    {"prompt": "What is the weather", "completion": " in Paris?\n"},
    {"prompt": "What is the ", "completion": "weather"},
]


@pytest.mark.parametrize("template", [CHATML_MARKED, LLAMA3_MARKED], ids=["chatml", "llama3"])
def test_messages(tmp_path: Path, template: str) -> None:
    tokenizer = chat_tokenizer(template)
    expected = theirs(tokenizer, PLAIN, assistant_only=True, completion_only=False)
    assert ours(tmp_path / "made", tokenizer, PLAIN) == expected
    whole = theirs(tokenizer, PLAIN, assistant_only=False, completion_only=False)
    assert ours(tmp_path / "all", tokenizer, PLAIN, train_on="all") == whole


@pytest.mark.parametrize("train_on", ["assistant", "last"])
@pytest.mark.parametrize("template", [unmarked(CHATML_MARKED), unmarked(LLAMA3_MARKED), MISTRAL, THINKING])
def test_prompt_and_completion_of_messages(tmp_path: Path, template: str, train_on: str) -> None:
    tokenizer = chat_tokenizer(template)
    expected = theirs(tokenizer, PAIRS, assistant_only=False, completion_only=True)
    assert ours(tmp_path / "made", tokenizer, PAIRS, train_on=train_on) == expected


def test_prompt_and_completion_of_messages_with_marks(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML_MARKED)
    expected = theirs(tokenizer, PAIRS, assistant_only=True, completion_only=True)
    assert ours(tmp_path / "made", tokenizer, PAIRS) == expected


def test_prompt_and_completion_as_text(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(CHATML_MARKED)
    expected = theirs(tokenizer, TEXTS, assistant_only=False, completion_only=True)
    assert ours(tmp_path / "made", tokenizer, TEXTS) == expected
    assert [labels.count(-100) > 0 for _, labels in expected] == [True, True]
    whole = theirs(tokenizer, TEXTS, assistant_only=False, completion_only=False)
    assert ours(tmp_path / "all", tokenizer, TEXTS, train_on="all") == whole
