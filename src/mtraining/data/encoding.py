"""Source items -> token ids, in order, here or in a bounded pool of worker processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mtraining.data.sources import Item, Skipped, read_item
from mtraining.data.tokenizer import Encoder
from mtraining.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """What one source item became: ids (tokens,) ending in end-of-text, or None if nothing of it was usable."""

    name: str
    ids: np.ndarray | None
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class EncodeSetup:
    """All that a worker needs to start."""

    tokenizer_folder: Path
    is_byte: bool
    eos_token_id: int


_worker: tuple[Encoder, int] | None = None


def _start_worker(setup: EncodeSetup) -> None:
    global _worker  # one encoder a process
    _worker = (Encoder(setup.tokenizer_folder, is_byte=setup.is_byte), setup.eos_token_id)


def _encode_in_worker(item: Item) -> Encoded:
    assert _worker is not None
    return _encode(item, *_worker)


def _encode(item: Item, encoder: Encoder, eos_token_id: int) -> Encoded:
    text, skipped = read_item(item)
    if not text.strip():
        return Encoded(item.name, None, skipped)
    return Encoded(item.name, np.append(encoder.encode(text), np.uint32(eos_token_id)), skipped)


def encode_all(
    entries: Iterable[Item | Skipped | None], setup: EncodeSetup, workers: int
) -> Iterator[Encoded]:
    """Encode items in their order; entries that are no item pass through in place (None as an empty result).

    At most a few items per worker are in flight, whatever the length of `entries`.
    """
    if workers == 1:
        encoder = Encoder(setup.tokenizer_folder, is_byte=setup.is_byte)
        for entry in entries:
            yield _encode(entry, encoder, setup.eos_token_id) if isinstance(entry, Item) else _pass(entry)
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
                "a tokenising process died, probably for lack of memory; lower workers and run again: "
                "finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pass(entry: Skipped | None) -> Encoded:
    return Encoded("", None, [entry] if entry else [])


def _result(pending: Future[Encoded] | Encoded) -> Encoded:
    return pending.result() if isinstance(pending, Future) else pending
