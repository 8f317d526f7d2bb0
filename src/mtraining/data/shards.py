"""The token-shard folder: its file names, and memory-mapped reading.

    tokens-00000.bin    token ids, uint16 if the vocabulary fits, else uint32 (little-endian)
    offsets-00000.npy   int64 (documents + 1,): where each document of the shard starts, in tokens
    shard-00000.json    names of the documents, what was skipped on the way, how far the sources were read, how many
                        documents came as token ids
    meta.json           tokenizer, vocabulary, counts, sources, a digest of the content; written last, so its presence
                        means complete
    tokenizer/          Hugging Face tokenizer folder
    prepare.json        the options, so that a rerun can continue or refuse
Documents end with the end-of-text id and are never cut by a shard; the shards in order are one stream of tokens.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mtraining.errors import UserError

FORMAT = "mtraining-shards-1"
META = "meta.json"
STATE = "prepare.json"
TOKENIZER = "tokenizer"
HOLDOUT = "holdout"
_DIGEST_TOKENS = 1 << 22  # read at once
_DTYPES = ("<u2", "<u4")


def tokens_file(shard: int) -> str:
    """File name of a shard's token ids."""
    return f"tokens-{shard:05d}.bin"


def offsets_file(shard: int) -> str:
    """File name of a shard's document offsets."""
    return f"offsets-{shard:05d}.npy"


def shard_file(shard: int) -> str:
    """File name of a shard's names and reading state; written after the other two."""
    return f"shard-{shard:05d}.json"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 while every id below ``vocab_size`` fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def content_digest(folder: Path, tokens: list[int], dtype: np.dtype[Any]) -> str:
    """xxh3 (128 bits, hexadecimal) of the documents: the stream of their tokens, then their lengths.

    How the stream is cut into shards, how wide its ids are stored, and where the folder lies make no difference. Every
    token is read once, at the speed of the disk.

    Args:
        tokens: of each shard.
        dtype: as stored.
    """
    digest, lengths = xxhash.xxh3_128(), xxhash.xxh3_128()
    for shard, count in enumerate(tokens):
        with open(folder / tokens_file(shard), "rb") as file:
            for start in range(0, count, _DIGEST_TOKENS):
                ids = np.fromfile(file, dtype=dtype, count=min(_DIGEST_TOKENS, count - start))
                digest.update(ids.astype("<u4").data)
        lengths.update(np.diff(np.load(folder / offsets_file(shard))).astype("<i8").data)
    digest.update(lengths.digest())
    return digest.hexdigest()


class TokenShards:
    """A prepared folder, memory-mapped. Token positions and document numbers run over all shards in order.

    Attributes:
        num_documents, num_tokens, vocab_size, eos_token_id, max_token_id: counts and ids from meta.json; vocab_size is
            the tokenizer's largest id and one more, however many words it has.
        lengths: int64 (num_documents,), tokens of each document with its end-of-text id.
        starts: int64 (num_documents,), where each document begins in the stream.
        tokenizer_path: the Hugging Face tokenizer folder.

    Raises:
        UserError: the folder is missing, not a prepared one, unfinished, damaged or truncated.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.meta = _read_meta(self.path)
        try:
            self.num_documents = int(self.meta["documents"])
            self.num_tokens = int(self.meta["tokens"])
            self.vocab_size = int(self.meta["vocab_size"])
            self.eos_token_id = int(self.meta["eos_token_id"])
            self.max_token_id = int(self.meta["max_token_id"])
            self.tokenizer_path = (self.path / self.meta["tokenizer_folder"]).resolve()
            sizes = [(int(shard["documents"]), int(shard["tokens"])) for shard in self.meta["shards"]]
            if self.meta["dtype"] not in _DTYPES:
                raise ValueError(f"dtype is {self.meta['dtype']!r}")
            self._dtype = np.dtype(self.meta["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"dataset '{self.path}' has a damaged {META} ({type(error).__name__}: {error}); prepare it again"
            ) from error
        offsets = [self._load_offsets(shard, *size) for shard, size in enumerate(sizes)]
        self.lengths = np.concatenate([np.diff(o) for o in offsets]) if offsets else np.zeros(0, np.int64)
        if (
            not self.num_tokens
            or self.lengths.sum() != self.num_tokens
            or len(self.lengths) != self.num_documents
        ):
            raise UserError(
                f"dataset '{self.path}' is empty or its counts disagree with {META}; prepare it again"
            )
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._shard_starts = np.cumsum([0, *(tokens for _, tokens in sizes)])
        self._first_documents = np.cumsum([0, *(documents for documents, _ in sizes)]).tolist()
        self._maps: dict[int, np.ndarray] = {}
        self._names: dict[int, list[str]] = {}

    def _load_offsets(self, shard: int, documents: int, tokens: int) -> np.ndarray:
        data, offsets = self.path / tokens_file(shard), self.path / offsets_file(shard)
        size = data.stat().st_size if data.exists() else 0
        if size != tokens * self._dtype.itemsize:
            raise UserError(
                f"dataset '{self.path}': {data.name} has {size:,} bytes, not the {tokens * self._dtype.itemsize:,} "
                f"of its {tokens:,} tokens; it is truncated or replaced, copy or prepare it again"
            )
        try:
            loaded: np.ndarray = np.load(offsets)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"dataset '{self.path}': {offsets.name} cannot be read; prepare it again"
            ) from error
        rising = loaded.ndim == 1 and loaded.size == documents + 1 and bool((np.diff(loaded) > 0).all())
        if not rising or loaded[0] != 0 or loaded[-1] != tokens:
            raise UserError(f"dataset '{self.path}': {offsets.name} disagrees with {META}; prepare it again")
        return loaded

    @property
    def identity(self) -> str:
        """Which documents these are, in words and a digest: the same wherever the folder lies.

        Folders of before the digest was kept are read whole for it.
        """
        digest = self.meta.get("content") or content_digest(
            self.path, np.diff(self._shard_starts).tolist(), self._dtype
        )
        return f"{self.num_documents:,} documents of {self.num_tokens:,} tokens (content {digest})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # a pickled memory map would carry the tokens themselves

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.path / tokens_file(shard), dtype=self._dtype, mode="r")
        return self._maps[shard]

    def _shard_of(self, document: int) -> int:
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        return bisect_right(self._first_documents, document) - 1

    def name(self, document: int) -> str:
        """The name of a document, as its source gave it."""
        shard = self._shard_of(document)
        if shard not in self._names:
            self._names[shard] = json.loads((self.path / shard_file(shard)).read_text())["names"]
        return self._names[shard][document - self._first_documents[shard]]

    def document(self, document: int) -> np.ndarray:
        """A read-only view (length,) of a document's tokens in the stored dtype."""
        shard = self._shard_of(document)
        start = int(self.starts[document] - self._shard_starts[shard])
        return self._map(shard)[start : start + int(self.lengths[document])]

    def documents(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, tokens) of every document in order."""
        for document in range(self.num_documents):
            yield self.name(document), self.document(document)

    def document_at(self, position: int) -> int:
        """The document that holds a token position of the stream."""
        if not 0 <= position < self.num_tokens:
            raise IndexError(f"token position {position} of {self.num_tokens}")
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def gather(self, positions: np.ndarray) -> np.ndarray:
        """int64 ids at the given positions of the stream, any shape; reads only the pages they lie on."""
        if positions.size and (positions.min() < 0 or positions.max() >= self.num_tokens):
            raise IndexError(f"token positions {positions.min()}..{positions.max()} of {self.num_tokens}")
        shards = np.searchsorted(self._shard_starts, positions, side="right") - 1
        out = np.empty(positions.shape, dtype=np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._map(int(shard))[positions[here] - self._shard_starts[shard]]
        return out


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / META
    if not path.is_dir():
        raise UserError(f"dataset '{path}' does not exist; run `mtraining prepare SOURCE {path}` first")
    if not file.exists():
        if (path / STATE).exists():
            raise UserError(
                f"dataset '{path}' is unfinished; run the same `mtraining prepare` again to complete it"
            )
        raise UserError(
            f"dataset '{path}' has no {META}; it was not written by `mtraining prepare`, correct the path"
        )
    try:
        meta = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"dataset '{path}' has a damaged {META}; prepare it again") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UserError(f"dataset '{path}' has a {META} of another format than {FORMAT}; prepare it again")
    return meta
