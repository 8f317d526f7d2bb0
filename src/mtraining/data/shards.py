"""The token-shard folder: its file names, and memory-mapped reading.

    tokens-00000.bin    token ids, uint16 if the vocabulary fits, else uint32 (little-endian)
    trained-00000.bin   uint8, 1 where the token is trained: the loss counts its prediction. Only beside shards with
                        tokens that are not, such as the prompts of conversations
    offsets-00000.npy   int64 (documents + 1,): where each document of the shard starts, in tokens
    shard-00000.json    names of the documents, what was skipped on the way, how far the sources were read, how many
                        documents came as token ids
    meta.json           tokenizer, vocabulary, counts, sources, a digest of the content; written last, so its presence
                        means complete
    tokenizer/          Hugging Face tokenizer folder
    ids-tokenizer/      that of the token ids that rows brought, if they were decoded
    prepare.json        the options, so that a rerun can continue or refuse
Documents are never cut by a shard; the shards in order are one stream of tokens. Documents of text end with the
end-of-text id, conversations as their chat template ends them.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from mtraining.errors import UserError

FORMAT = "mtraining-shards-1"
FORMAT_MASKED = "mtraining-shards-2"
"""Of folders in which some tokens are not trained: a program that only knows the first format would train on them."""
META = "meta.json"
STATE = "prepare.json"
TOKENIZER = "tokenizer"
IDS_TOKENIZER = "ids-tokenizer"
HOLDOUT = "holdout"
IGNORE = -100
"""The label of a token that is not trained."""
_DIGEST_TOKENS = 1 << 22  # read at once
_DTYPES = ("<u2", "<u4")


def tokens_file(shard: int) -> str:
    """File name of a shard's token ids."""
    return f"tokens-{shard:05d}.bin"


def trained_file(shard: int) -> str:
    """File name of a shard's mask of trained tokens."""
    return f"trained-{shard:05d}.bin"


def offsets_file(shard: int) -> str:
    """File name of a shard's document offsets."""
    return f"offsets-{shard:05d}.npy"


def shard_file(shard: int) -> str:
    """File name of a shard's names and reading state; written after the others."""
    return f"shard-{shard:05d}.json"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 while every id below ``vocab_size`` fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def content_digest(
    folder: Path, tokens: Sequence[int], dtype: np.dtype[Any], masked: Sequence[bool] = ()
) -> str:
    """xxh3 (128 bits, hexadecimal) of the documents: the stream of their tokens, then their lengths, then which of the
    tokens are trained, where not all are.

    How the stream is cut into shards, how wide its ids are stored, and where the folder lies make no difference. Every
    token is read once, at the speed of the disk.

    Args:
        tokens: of each shard.
        dtype: as stored.
        masked: whether each shard has a mask of trained tokens; empty for none.
    """
    digest, lengths = xxhash.xxh3_128(), xxhash.xxh3_128()
    for shard, count in enumerate(tokens):
        with open(folder / tokens_file(shard), "rb") as file:
            for start in range(0, count, _DIGEST_TOKENS):
                ids = np.fromfile(file, dtype=dtype, count=min(_DIGEST_TOKENS, count - start))
                digest.update(ids.astype("<u4").data)
        lengths.update(np.diff(np.load(folder / offsets_file(shard))).astype("<i8").data)
    digest.update(lengths.digest())
    if any(masked):
        digest.update(_mask_digest(folder, tokens, masked))
    return digest.hexdigest()


def _mask_digest(folder: Path, tokens: Sequence[int], masked: Sequence[bool]) -> bytes:
    digest = xxhash.xxh3_128()
    for shard, count in enumerate(tokens):
        with open(folder / trained_file(shard), "rb") if masked[shard] else nullcontext() as file:
            for start in range(0, count, _DIGEST_TOKENS):
                size = min(_DIGEST_TOKENS, count - start)
                digest.update(file.read(size) if file else b"\1" * size)
    return digest.digest()


class TokenShards:
    """A prepared folder, memory-mapped. Token positions and document numbers run over all shards in order.

    Attributes:
        num_documents, num_tokens, vocab_size, eos_token_id, max_token_id: counts and ids from meta.json; vocab_size is
            the tokenizer's largest id and one more, however many words it has.
        num_trained: tokens whose prediction the loss counts; the others have label -100.
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
            self._masked = ["trained" in shard for shard in self.meta["shards"]]
            self.num_trained = sum(int(s.get("trained", s["tokens"])) for s in self.meta["shards"])
            if self.meta["dtype"] not in _DTYPES:
                raise ValueError(f"dtype is {self.meta['dtype']!r}")
            self._dtype = np.dtype(self.meta["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"dataset '{self.path}' has a damaged {META} ({type(error).__name__}: {error}); prepare it again"
            ) from error
        offsets = [self._load_offsets(shard, *size) for shard, size in enumerate(sizes)]
        for shard, (_, tokens) in enumerate(sizes):
            if self._masked[shard]:
                self._check_size(trained_file(shard), tokens, tokens)
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
        self._masks: dict[int, np.ndarray] = {}
        self._names: dict[int, list[str]] = {}

    def _load_offsets(self, shard: int, documents: int, tokens: int) -> np.ndarray:
        offsets = self.path / offsets_file(shard)
        self._check_size(tokens_file(shard), tokens * self._dtype.itemsize, tokens)
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

    def _check_size(self, name: str, wanted: int, tokens: int) -> None:
        file = self.path / name
        size = file.stat().st_size if file.exists() else 0
        if size != wanted:
            raise UserError(
                f"dataset '{self.path}': {name} has {size:,} bytes, not the {wanted:,} of its {tokens:,} tokens; it is "
                "truncated or replaced, copy or prepare it again"
            )

    @property
    def masked(self) -> bool:
        """Whether some tokens are not trained."""
        return any(self._masked)

    @property
    def identity(self) -> str:
        """Which documents these are, in words and a digest: the same wherever the folder lies.

        Folders of before the digest was kept are read whole for it.
        """
        digest = self.meta.get("content") or content_digest(
            self.path, np.diff(self._shard_starts).tolist(), self._dtype, self._masked
        )
        trained = f", {self.num_trained:,} of them trained" if self.masked else ""
        return f"{self.num_documents:,} documents of {self.num_tokens:,} tokens{trained} (content {digest})"

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the tokens themselves.
        return {**self.__dict__, "_maps": {}, "_masks": {}}

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.path / tokens_file(shard), dtype=self._dtype, mode="r")
        return self._maps[shard]

    def _mask(self, shard: int) -> np.ndarray:
        """uint8 (tokens of the shard,), not 0 where a token is trained."""
        if shard not in self._masks:
            tokens = int(self._shard_starts[shard + 1] - self._shard_starts[shard])
            self._masks[shard] = (
                np.memmap(self.path / trained_file(shard), dtype=np.uint8, mode="r")
                if self._masked[shard]
                # one byte, however many tokens
                else np.broadcast_to(np.uint8(1), (tokens,))
            )
        return self._masks[shard]

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
        return self._gather(positions, self._map, np.dtype(np.int64))

    def trained(self, positions: np.ndarray) -> np.ndarray:
        """bool, of the shape of ``positions``: whether the loss counts the prediction of the token at each position."""
        return self._gather(positions, self._mask, np.dtype(bool))

    def any_trained(self, start: int, stop: int) -> bool:
        """Whether the stream's tokens from ``start`` up to ``stop`` include a trained one."""
        first = int(np.searchsorted(self._shard_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._shard_starts, stop, side="left"))
        for shard in range(first, last):
            before = int(self._shard_starts[shard])
            if self._mask(shard)[max(0, start - before) : stop - before].any():
                return True
        return False

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """int64 ids at the given positions as labels of the tokens before them: -100 where a token is not trained."""
        ids = self.gather(positions)
        return np.where(self.trained(positions), ids, IGNORE) if self.masked else ids

    def _gather(
        self, positions: np.ndarray, stored: Callable[[int], np.ndarray], dtype: np.dtype[Any]
    ) -> np.ndarray:
        if positions.size and (positions.min() < 0 or positions.max() >= self.num_tokens):
            raise IndexError(f"token positions {positions.min()}..{positions.max()} of {self.num_tokens}")
        shards = np.searchsorted(self._shard_starts, positions, side="right") - 1
        out = np.empty(positions.shape, dtype=dtype)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = stored(int(shard))[positions[here] - self._shard_starts[shard]]
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
    if not isinstance(meta, dict) or meta.get("format") not in (FORMAT, FORMAT_MASKED):
        raise UserError(f"dataset '{path}' has a {META} of another format than {FORMAT}; prepare it again")
    return meta
