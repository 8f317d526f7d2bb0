"""Source items -> token ids, in order, here or in a bounded pool of worker processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mtraining.data.chat import ChatEncoder
from mtraining.data.conversation import Completion, Conversation
from mtraining.data.reading import read_item
from mtraining.data.sources import EMPTY, UNDECODABLE, Item, Note, Skipped
from mtraining.data.tokenizer import Encoder
from mtraining.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """What one source item became.

    Attributes:
        ids: of shape (tokens,), ending in end-of-text unless it is a conversation; None if nothing of it was usable.
        ready: it came as token ids.
        trained: bool, of the shape of ids: which tokens are trained; None for all.
        is_chat: it was a conversation, or a prompt and its completion.
    """

    name: str
    ids: np.ndarray | None
    skipped: list[Skipped] = field(default_factory=list)
    ready: bool = False
    trained: np.ndarray | None = None
    is_chat: bool = False


@dataclass(frozen=True)
class EncodeSetup:
    """All that a worker needs to start.

    `bos_token_id` goes before each document of text, and before token ids that lack it if `bos_before_ids`; None for
    neither. Conversations train on the tokens that `train_on` says. Documents of fewer than `min_length` or more than
    `max_length` tokens are left out. Token ids that rows bring are of `ids_tokenizer`, if one is given.
    """

    tokenizer_folder: Path
    eos_token_id: int
    tokenizer: str
    bos_token_id: int | None = None
    bos_before_ids: bool = False
    train_on: str = "assistant"
    min_length: int | None = None
    max_length: int | None = None
    skip_unknown_ids: bool = False
    ids_tokenizer: str | None = None
    ids_tokenizer_folder: Path | None = None


_worker: ItemEncoder | None = None


def _start_worker(setup: EncodeSetup) -> None:
    global _worker  # one encoder a process
    _worker = ItemEncoder(setup)


def _encode_in_worker(item: Item) -> Encoded:
    assert _worker is not None
    return _worker.encode(item)


class ItemEncoder:
    """Encodes one item after another."""

    def __init__(self, setup: EncodeSetup) -> None:
        self._setup = setup
        self._encoder = Encoder(setup.tokenizer_folder, is_byte=setup.tokenizer == "byte")

    @cached_property
    def _chats(self) -> ChatEncoder:
        setup = self._setup
        return ChatEncoder(setup.tokenizer_folder, setup.train_on, setup.tokenizer)

    def encode(self, item: Item) -> Encoded:
        """What an item becomes.

        Raises:
            UserError: what is wrong is not the item alone: ids of another tokenizer, a chat template that cannot be
                used.
        """
        made = self._read(item)
        if made.ids is None:
            return made
        setup = self._setup
        if setup.min_length is not None and made.ids.size < setup.min_length:
            short = Note(item.name, f"shorter than --min-length {setup.min_length:,}")
            return Encoded(item.name, None, [*made.skipped, short])
        if setup.max_length is not None and made.ids.size > setup.max_length:
            long = Skipped(item.name, f"longer than --max-length {setup.max_length:,}")
            return Encoded(item.name, None, [*made.skipped, long])
        return made

    def _read(self, item: Item) -> Encoded:
        if item.ids is not None:
            return self._ready(item.name, item.ids)
        if isinstance(item.chat, Conversation):
            found = self._chats.encode(item.name, item.chat)
            if isinstance(found, str):
                return Encoded(item.name, None, [Skipped(item.name, found)])
            return Encoded(item.name, found[0], trained=found[1], is_chat=True)
        if item.chat is not None:
            return self._completion(item.name, item.chat)
        text, skipped = read_item(item)
        return Encoded(item.name, self._around(text) if text.strip() else None, skipped)

    def _around(self, text: str) -> np.ndarray:
        """uint32 ids of a text, with what stands before and after a document."""
        return np.concatenate([self._before, self._encoder.encode(text), self._after])

    @property
    def _before(self) -> np.ndarray:
        bos = self._setup.bos_token_id
        return np.array([] if bos is None else [bos], np.uint32)

    @property
    def _after(self) -> np.ndarray:
        return np.array([self._setup.eos_token_id], np.uint32)

    def _completion(self, name: str, pair: Completion) -> Encoded:
        """Prompt and completion as one text. Trained from where its tokens depart from those of the prompt alone."""
        try:
            ids, prompt = self._around(pair.prompt + pair.completion), self._encoder.encode(pair.prompt)
        except UnicodeEncodeError:
            return Encoded(name, None, [Skipped(name, UNDECODABLE)])
        if self._setup.train_on == "all":
            return Encoded(name, ids, is_chat=True)
        prompt = np.concatenate([self._before, prompt])[: ids.size]
        differs = np.flatnonzero(prompt != ids[: prompt.size])
        trained = np.arange(ids.size) >= (int(differs[0]) if differs.size else prompt.size)
        return Encoded(name, ids, trained=trained, is_chat=True)

    def _ready(self, name: str, ids: np.ndarray) -> Encoded:
        """Token ids that a row brought, ending in end-of-text once."""
        setup = self._setup
        named, option = setup.ids_tokenizer, "--ids-tokenizer"
        if named is None:
            named, option = setup.tokenizer, "--tokenizer"
        unknown = self._of_ids.unknown(ids)
        if unknown is not None and setup.skip_unknown_ids:
            return Encoded(name, None, [Skipped(name, f"holds token ids that '{named}' does not have")])
        if unknown is not None:
            raise UserError(
                f"document '{name}' holds token id {unknown}, which tokenizer '{named}' does not have; name by "
                f"{option} the one that the ids are of, or leave such rows out by --bad-rows skip"
            )
        if setup.ids_tokenizer is not None:
            text = self._of_ids.decode(ids)
            if not text.strip():
                return Encoded(name, None, [Skipped(name, EMPTY)])
            return Encoded(name, self._around(text), ready=True)
        before = [setup.bos_token_id] if setup.bos_before_ids and ids[0] != setup.bos_token_id else []
        after = [setup.eos_token_id] if ids[-1] != setup.eos_token_id else []
        whole = np.concatenate([np.array(part, np.uint32) for part in (before, ids, after)])
        return Encoded(name, whole, ready=True)

    @cached_property
    def _of_ids(self) -> Encoder:
        """What knows the token ids that rows bring."""
        folder = self._setup.ids_tokenizer_folder
        return (
            self._encoder if folder is None else Encoder(folder, is_byte=self._setup.ids_tokenizer == "byte")
        )


def encode_all(
    entries: Iterable[Item | Skipped | None], setup: EncodeSetup, workers: int
) -> Iterator[Encoded]:
    """Encode items in their order; entries that are no item pass through in place (None as an empty result).

    At most a few items per worker are in flight, whatever the length of `entries`.
    """
    if workers == 1:
        encoder = ItemEncoder(setup)
        for entry in entries:
            yield encoder.encode(entry) if isinstance(entry, Item) else _pass(entry)
        return
    # forkserver: a plain fork of a process with running threads (progress bar, tokenizers, torch) may deadlock
    with ProcessPoolExecutor(workers, get_context("forkserver"), _start_worker, (setup,)) as pool:
        pending: deque[Future[Encoded] | Encoded] = deque()
        try:
            for entry in entries:
                pending.append(
                    pool.submit(_encode_in_worker, entry) if isinstance(entry, Item) else _pass(entry)
                )
                if len(pending) >= 4 * workers:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        except BrokenProcessPool as error:
            raise UserError(
                "a tokenising process died, probably for lack of memory; lower --workers and run again: "
                "finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pass(entry: Skipped | None) -> Encoded:
    return Encoded("", None, [entry] if entry else [])


def _result(pending: Future[Encoded] | Encoded) -> Encoded:
    return pending.result() if isinstance(pending, Future) else pending
