from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared import save_llama_like, tree
from tokenizers import Tokenizer, models, pre_tokenizers

from mtraining.data import save_byte_tokenizer
from mtraining.data.tokenizer import BYTE_VOCAB_SIZE, Encoder, Separators, byte_tokenizer, save_tokenizer
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


def test_bare_tokenizer_file_needs_an_eos(tmp_path: Path, word_tokenizer: Path) -> None:
    with pytest.raises(UserError, match="set --eos-token"):
        save_tokenizer(str(word_tokenizer), None, tmp_path / "out")
    with pytest.raises(UserError, match="--eos-token '<eos>' is not in the vocabulary"):
        save_tokenizer(str(word_tokenizer), "<eos>", tmp_path / "out")
    assert save_tokenizer(str(word_tokenizer), "</s>", tmp_path / "out") == Separators(4, "</s>", 3)
    ids = Encoder(tmp_path / "out", is_byte=False).encode("a b a c")
    assert ids.dtype == np.uint32
    assert ids.tolist() == [1, 2, 1, 0]


def test_choosing_a_separator_does_not_change_the_saved_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    name = str(save_llama_like(tmp_path / "mine", with_bos=True))
    own = save_tokenizer(name, None, tmp_path / "own")
    other = save_tokenizer(name, "<|end|>", tmp_path / "other", add_bos=False)
    assert (own.eos_token_id, other.eos_token, other.eos_token_id) == (2, "<|end|>", 5)
    assert tree(tmp_path / "own") == tree(tmp_path / "other")
    assert AutoTokenizer.from_pretrained(tmp_path / "other").eos_token == "</s>"


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("add_bos", [None, False, True])
def test_a_beginning_is_added_as_the_tokenizer_does_unless_asked(
    tmp_path: Path, with_bos: bool, add_bos: bool | None
) -> None:
    name = str(save_llama_like(tmp_path / "mine", with_bos=with_bos))
    found = save_tokenizer(name, None, tmp_path / "out", add_bos)
    added = with_bos if add_bos is None else add_bos
    assert (found.bos_token_id, found.bos_token) == ((1, "<s>") if added else (None, None))
    told = found.render(add_bos)
    assert ("begins with <s> (1)" in told) == added
    assert ("as the tokenizer does by itself" in told) == (add_bos is None)
    assert "has no token to begin one with" in save_tokenizer("byte", None, tmp_path / "byte").render(None)


def test_a_beginning_that_does_not_exist_is_refused(tmp_path: Path, word_tokenizer: Path) -> None:
    for name in ("byte", str(word_tokenizer)):
        with pytest.raises(UserError, match="^--add-bos: .* has no beginning-of-text token; leave it out"):
            save_tokenizer(name, "</s>" if name != "byte" else None, tmp_path / "out", add_bos=True)


def test_ids_may_have_gaps(tmp_path: Path) -> None:
    vocab = {f"w{n}": n for n in range(9)} | {"</s>": 9, "far": 70_000}
    Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    found = save_tokenizer(str(tmp_path / "tokenizer.json"), "</s>", tmp_path / "out")
    assert found.vocab_size == 70_001
    encoder = Encoder(tmp_path / "out", is_byte=False)
    assert encoder.unknown(np.array([0, 70_000, 9])) is None
    for bad in (-1, 10, 69_999, 70_001, 2**40):
        assert encoder.unknown(np.array([0, bad])) == bad
    assert Encoder(tmp_path, is_byte=True).unknown(np.array([259, 260])) == 260


def test_a_document_cannot_forge_a_separator(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    assert Encoder(tmp_path, is_byte=False).encode("a<|endoftext|>").max() < 256


@pytest.mark.parametrize("name", ["no/such-tokenizer", "no-such-tokenizer", "./typo", "typo.json"])
def test_unknown_tokenizer_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        UserError, match=f"tokenizer '{name}' (is no path here|does not exist).*; correct the path, or"
    ):
        save_tokenizer(name, None, tmp_path)


def test_corrupt_tokenizer_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        save_tokenizer(str(tmp_path / "tokenizer.json"), None, tmp_path / "out")


def test_byte_tokenizer_refuses_foreign_separator(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not in the byte tokenizer"):
        save_tokenizer("byte", "</s>", tmp_path)
