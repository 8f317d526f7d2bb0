"""Reading shards: views, positions over shard borders, pickling, and every kind of damage named."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mtraining.data import TokenShards
from mtraining.errors import UserError


@pytest.fixture
def shards(make_shards: Callable[..., TokenShards], counting: dict[str, str]) -> TokenShards:
    return make_shards(counting, shard_tokens=40)  # shards of [d10, d37], [d3, d100], [d64]


def stream(counting: dict[str, str]) -> list[int]:
    return [token for text in counting.values() for token in [*text.encode(), 256]]


def test_documents_names_and_positions(shards: TokenShards, counting: dict[str, str]) -> None:
    assert [shard["documents"] for shard in shards.meta["shards"]] == [2, 2, 1]
    assert [name for name, _ in shards.documents()] == list(counting)
    assert shards.lengths.tolist() == [len(text) + 1 for text in counting.values()]
    everything = stream(counting)
    assert shards.num_tokens == len(everything)
    assert np.concatenate([ids for _, ids in shards.documents()]).tolist() == everything
    owners = [shards.document_at(position) for position in range(shards.num_tokens)]
    assert owners == np.repeat(np.arange(5), shards.lengths).tolist()
    assert shards.vocab_size == 260 and shards.eos_token_id == 256 and shards.max_token_id == 256


def test_gather_crosses_shards_in_any_order_and_shape(shards: TokenShards, counting: dict[str, str]) -> None:
    everything = np.array(stream(counting))
    positions = np.random.default_rng(0).permutation(shards.num_tokens)[:200].reshape(10, 20)
    found = shards.gather(positions)
    assert found.dtype == np.int64
    assert (found == everything[positions]).all()


def test_outside_positions_are_errors_not_wrapped(shards: TokenShards) -> None:
    for position in (-1, shards.num_tokens):
        with pytest.raises(IndexError):
            shards.gather(np.array([0, position]))
        with pytest.raises(IndexError):
            shards.document_at(position)
    for document in (-1, shards.num_documents):
        with pytest.raises(IndexError):
            shards.document(document)
        with pytest.raises(IndexError):
            shards.name(document)


def test_views_are_mapped_and_read_only(shards: TokenShards) -> None:
    view = shards.document(3)
    assert isinstance(view, np.memmap)
    assert not view.flags.writeable


def test_pickle_carries_no_tokens(make_shards: Callable[..., TokenShards]) -> None:
    shards = make_shards({"long": "x" * 200_000})
    assert int(shards.gather(np.array([199_999]))[0]) == ord("x")
    data = pickle.dumps(shards)
    assert len(data) < 10_000
    assert int(pickle.loads(data).gather(np.array([200_000]))[0]) == 256


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        TokenShards(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def edit_meta(path: Path, **changes: object) -> None:
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, **changes}))


def test_missing_and_foreign_folders(tmp_path: Path, shards: TokenShards) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    assert "was not written by `mtraining prepare`" in refusal(tmp_path / "other")
    (shards.path / "meta.json").unlink()
    assert "unfinished" in refusal(shards.path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}'])
def test_damaged_meta(shards: TokenShards, text: str) -> None:
    (shards.path / "meta.json").write_text(text)
    assert "meta.json" in refusal(shards.path)


def test_meta_of_wrong_shape(shards: TokenShards) -> None:
    edit_meta(shards.path, shards=3)
    assert "damaged meta.json" in refusal(shards.path)
    edit_meta(shards.path, shards=[], documents=0, tokens=0)
    assert "is empty" in refusal(shards.path)


def test_truncated_tokens(shards: TokenShards) -> None:
    file = shards.path / "tokens-00001.bin"
    file.write_bytes(file.read_bytes()[:-3])
    assert "tokens-00001.bin has 207 bytes, not the 210 of its 105 tokens; it is truncated" in refusal(
        shards.path
    )
    file.unlink()
    assert "tokens-00001.bin has 0 bytes" in refusal(shards.path)


def test_damaged_offsets(shards: TokenShards) -> None:
    file = shards.path / "offsets-00000.npy"
    good = np.load(file)
    for wrong in (good[:-1], good[::-1], good + 1):
        np.save(file, wrong)
        assert "offsets-00000.npy disagrees" in refusal(shards.path)
    file.write_bytes(b"\x93NUMPY")
    assert "offsets-00000.npy cannot be read" in refusal(shards.path)
    file.unlink()
    assert "offsets-00000.npy cannot be read" in refusal(shards.path)


def test_a_copied_folder_is_whole(tmp_path: Path, shards: TokenShards) -> None:
    copied = TokenShards(shutil.copytree(shards.path, tmp_path / "elsewhere"))
    assert copied.tokenizer_path == (tmp_path / "elsewhere" / "tokenizer").resolve()
    assert (copied.document(4) == shards.document(4)).all()


def test_identity_is_the_documents_and_nothing_else(
    make_shards: Callable[..., TokenShards], counting: dict[str, str], tmp_path: Path
) -> None:
    """The cut into shards, the width of an id and the folder make no difference; a token, an end and an order do."""

    def made(documents: dict[str, str], **options: int) -> TokenShards:
        shards = make_shards(documents, **options)
        moved = shutil.move(shards.path, tmp_path / f"moved{len(list(tmp_path.iterdir()))}")
        return TokenShards(moved)

    first = made(counting)
    assert first.meta["content"] in first.identity and first.identity.startswith("5 documents of 219 tokens")
    assert made(counting, shard_tokens=40).identity == first.identity
    wide = made(counting)
    for file in wide.path.glob("tokens-*.bin"):
        np.fromfile(file, "<u2").astype("<u4").tofile(file)
    edit_meta(wide.path, dtype="<u4")
    written = json.loads((wide.path / "meta.json").read_text())
    (wide.path / "meta.json").write_text(json.dumps({k: v for k, v in written.items() if k != "content"}))
    assert TokenShards(wide.path).identity == first.identity
    names = list(counting)
    one_byte = {**counting, "d3": "abc"}
    other_order = {name: counting[name] for name in reversed(names)}
    whole = "".join(counting.values())
    other_ends = {name: whole[i * 42 : (i + 1) * 42 + (4 if i == 4 else 0)] for i, name in enumerate(names)}
    others = [made(documents).identity for documents in (one_byte, other_order, other_ends)]
    offsets = np.load(wide.path / "offsets-00000.npy")
    offsets[1] += 1  # the same tokens, though a document ends one later
    np.save(wide.path / "offsets-00000.npy", offsets)
    others.append(TokenShards(wide.path).identity)
    assert len({first.identity, *others}) == 5
