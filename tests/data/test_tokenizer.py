from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from mtraining.data import save_byte_tokenizer
from mtraining.data.tokenizer import BYTE_VOCAB_SIZE, Encoder, byte_tokenizer, save_tokenizer
from mtraining.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXT | st.sampled_from(["<|endoftext|>", "a<|pad|>b", "".join(map(chr, range(300))), "日本 🙂\r\n\t"]))
def test_fast_path_equals_the_tokenizer(text: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.encode_special_tokens = True
    ids = Encoder(Path("unused"), is_byte=True).encode(text)
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_every_byte_has_its_own_value_as_id() -> None:
    # covers the bytes that no UTF-8 text holds, too
    tokenizer = byte_tokenizer()
    spelled = pre_tokenizers.ByteLevel.alphabet()
    assert sorted(tokenizer.token_to_id(character) for character in spelled) == list(range(256))
    assert tokenizer.get_vocab_size() == BYTE_VOCAB_SIZE == 260


def test_transformers_loads_the_byte_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_byte_tokenizer(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (256, 257, 260)
    assert loaded("é")["input_ids"] == [0xC3, 0xA9]
    assert loaded.decode([0xC3, 0xA9, 256], skip_special_tokens=True) == "é"
    assert loaded("x<|endoftext|>", add_special_tokens=False)["input_ids"] == [120, 256]


@pytest.fixture
def word_tokenizer(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_bare_tokenizer_file_needs_an_eos_and_keeps_it(tmp_path: Path, word_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    with pytest.raises(UserError, match="set eos_token"):
        save_tokenizer(str(word_tokenizer), None, tmp_path / "out")
    with pytest.raises(UserError, match="'<eos>' is not in the vocabulary"):
        save_tokenizer(str(word_tokenizer), "<eos>", tmp_path / "out")
    assert save_tokenizer(str(word_tokenizer), "</s>", tmp_path / "out") == (4, 3)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 3
    # the saved folder is itself a tokenizer that names its separator
    assert save_tokenizer(str(tmp_path / "out"), None, tmp_path / "again") == (4, 3)
    ids = Encoder(tmp_path / "again", is_byte=False).encode("a b a c")
    assert ids.dtype == np.uint32
    assert ids.tolist() == [1, 2, 1, 0]


def test_a_document_cannot_forge_a_separator(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    assert Encoder(tmp_path, is_byte=False).encode("a<|endoftext|>").max() < 256


@pytest.mark.parametrize("name", ["no/such-tokenizer", "no-such-tokenizer"])
def test_unknown_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"tokenizer '{name}' cannot be loaded"):
        save_tokenizer(name, None, tmp_path)


def test_corrupt_tokenizer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        save_tokenizer(str(tmp_path / "tokenizer.json"), None, tmp_path / "out")


def test_byte_tokenizer_refuses_foreign_separator(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not in the byte tokenizer"):
        save_tokenizer("byte", "</s>", tmp_path)
