"""Writing token shards: every file appears whole or not at all, and finished shards are the only state of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mtraining.data.encoding import Encoded
from mtraining.data.shards import offsets_file, shard_file, tokens_file, trained_file
from mtraining.data.sources import Skipped
from mtraining.errors import UserError


def write_atomic(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Fill a temporary file beside `path`, flush it to the disk, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


class ShardWriter:
    """Collects documents and writes a shard whenever `shard_tokens` are reached.

    Opened on a folder with finished shards it goes on after them: `consumed` source items need not be read again.

    Attributes:
        consumed: source items that the finished shards and the open one account for.
        shards: {"documents", "tokens"} of each finished shard, and "trained" tokens where not all are.
        reused: how many of them were there before.
        ready: documents that came as token ids.
        conversations: documents that were conversations, or a prompt and its completion.
        skipped: everything reported through `skip`, over all shards.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.dtype, self.shard_tokens = folder, dtype, shard_tokens
        self.consumed = 0
        self.max_token_id = 0
        self.ready = self.conversations = 0
        self.shards: list[dict[str, int]] = []
        self.skipped: list[Skipped] = []
        self._names: list[str] = []
        self._ids: list[np.ndarray] = []
        # of the same length as _ids
        self._trained: list[np.ndarray | None] = []
        self._open_tokens = self._open_ready = self._open_conversations = 0
        self._open_skipped: list[Skipped] = []
        while (file := folder / shard_file(len(self.shards))).exists():
            state = json.loads(file.read_text())
            self.shards.append({"documents": len(state["names"]), "tokens": state["tokens"]})
            if "trained" in state:
                self.shards[-1]["trained"] = state["trained"]
            self.skipped += [Skipped(*entry) for entry in state["skipped"]]
            self.consumed = state["consumed"]
            self.max_token_id = max(self.max_token_id, state["max_token_id"])
            self.ready += state.get("ready", 0)
            self.conversations += state.get("conversations", 0)
        self.reused = len(self.shards)

    @property
    def documents(self) -> int:
        """Documents so far, the open shard's too."""
        return sum(shard["documents"] for shard in self.shards) + len(self._names)

    @property
    def tokens(self) -> int:
        """Tokens so far, the open shard's too."""
        return sum(shard["tokens"] for shard in self.shards) + self._open_tokens

    @property
    def masked(self) -> list[bool]:
        """Whether each finished shard has a mask of trained tokens."""
        return ["trained" in shard for shard in self.shards]

    def skip(self, entries: list[Skipped]) -> None:
        """Report what was left out."""
        self.skipped += entries
        self._open_skipped += entries

    def add(self, made: Encoded) -> None:
        """Append a document, of which there are ids.

        Raises:
            UserError: an id that the stored width cannot hold.
        """
        ids, trained = made.ids, made.trained
        assert ids is not None
        largest = int(ids.max())
        if largest > np.iinfo(self.dtype).max:
            raise UserError(
                f"document '{made.name}' has token id {largest}, beyond the largest that its tokenizer names; mend the "
                "tokenizer's vocabulary, or name another by --tokenizer"
            )
        self.ready += made.ready
        self._open_ready += made.ready
        self.conversations += made.is_chat
        self._open_conversations += made.is_chat
        self._names.append(made.name)
        self._ids.append(ids.astype(self.dtype))
        self._trained.append(None if trained is None or trained.all() else trained)
        self._open_tokens += ids.size
        self.max_token_id = max(self.max_token_id, largest)

    def item_done(self, *, last: bool = False) -> None:
        """One more source item is accounted for; closes the shard if it is full or this was the `last`."""
        self.consumed += not last
        if self._names and (last or self._open_tokens >= self.shard_tokens):
            self._close()

    def _close(self) -> None:
        number = len(self.shards)
        offsets = np.cumsum([0, *(ids.size for ids in self._ids)], dtype=np.int64)
        write_atomic(
            self.folder / tokens_file(number), lambda file: [file.write(ids.data) for ids in self._ids]
        )
        write_atomic(self.folder / offsets_file(number), lambda file: np.save(file, offsets))
        state: dict[str, Any] = {
            "consumed": self.consumed,
            "tokens": self._open_tokens,
            "max_token_id": self.max_token_id,
            "ready": self._open_ready,
            "conversations": self._open_conversations,
            "skipped": [[entry.name, entry.reason] for entry in self._open_skipped],
            "names": self._names,
        }
        entry = {"documents": len(self._names), "tokens": self._open_tokens}
        if any(mask is not None for mask in self._trained):
            masks = [
                np.ones(ids.size, np.uint8) if mask is None else mask.astype(np.uint8)
                for ids, mask in zip(self._ids, self._trained, strict=True)
            ]
            write_atomic(
                self.folder / trained_file(number), lambda file: [file.write(mask.data) for mask in masks]
            )
            state["trained"] = entry["trained"] = sum(int(mask.sum()) for mask in masks)
        write_json(self.folder / shard_file(number), state)  # last: a shard counts only once this is there
        self.shards.append(entry)
        self._names, self._ids, self._trained, self._open_skipped = [], [], [], []
        self._open_tokens = self._open_ready = self._open_conversations = 0
