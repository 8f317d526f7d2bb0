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

from mtraining.data.reading import read_item
from mtraining.data.sources import Item, Skipped
from mtraining.data.tokenizer import Encoder
from mtraining.errors import UserError


@dataclass(frozen=True)
class Encoded:
    """What one source item became: ids (tokens,) ending in end-of-text, or None if nothing of it was usable; `ready` if
    it came as token ids."""

    name: str
    ids: np.ndarray | None
    skipped: list[Skipped] = field(default_factory=list)
    ready: bool = False


@dataclass(frozen=True)
class EncodeSetup:
    """All that a worker needs to start.

    `bos_token_id` goes before each document of text, and before token ids that lack it if `bos_before_ids`; None for
    neither.
    """

    tokenizer_folder: Path
    is_byte: bool
    eos_token_id: int
    tokenizer: str = "byte"
    bos_token_id: int | None = None
    bos_before_ids: bool = False


_worker: tuple[Encoder, EncodeSetup] | None = None


def _start_worker(setup: EncodeSetup) -> None:
    global _worker  # one encoder a process
    _worker = (Encoder(setup.tokenizer_folder, is_byte=setup.is_byte), setup)


def _encode_in_worker(item: Item) -> Encoded:
    assert _worker is not None
    return _encode(item, *_worker)


def _encode(item: Item, encoder: Encoder, setup: EncodeSetup) -> Encoded:
    bos, eos = setup.bos_token_id, setup.eos_token_id
    if item.ids is not None:
        return Encoded(item.name, _finished(item.name, item.ids, encoder, setup), ready=True)
    text, skipped = read_item(item)
    if not text.strip():
        return Encoded(item.name, None, skipped)
    before = [] if bos is None else [bos]
    parts = (np.array(before, np.uint32), encoder.encode(text), np.array([eos], np.uint32))
    return Encoded(item.name, np.concatenate(parts), skipped)


def _finished(name: str, ids: np.ndarray, encoder: Encoder, setup: EncodeSetup) -> np.ndarray:
    """Token ids that a row brought, ending in end-of-text once; uint32.

    Raises:
        UserError: an id that is not the tokenizer's.
    """
    unknown = encoder.unknown(ids)
    if unknown is not None:
        raise UserError(
            f"document '{name}' holds token id {unknown}, which tokenizer '{setup.tokenizer}' does not have; name by "
            "--tokenizer the one that the ids are of"
        )
    before = [setup.bos_token_id] if setup.bos_before_ids and ids[0] != setup.bos_token_id else []
    after = [setup.eos_token_id] if ids[-1] != setup.eos_token_id else []
    return np.concatenate([np.array(part, np.uint32) for part in (before, ids, after)])


def encode_all(
    entries: Iterable[Item | Skipped | None], setup: EncodeSetup, workers: int
) -> Iterator[Encoded]:
    """Encode items in their order; entries that are no item pass through in place (None as an empty result).

    At most a few items per worker are in flight, whatever the length of `entries`.
    """
    if workers == 1:
        encoder = Encoder(setup.tokenizer_folder, is_byte=setup.is_byte)
        for entry in entries:
            yield _encode(entry, encoder, setup) if isinstance(entry, Item) else _pass(entry)
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
