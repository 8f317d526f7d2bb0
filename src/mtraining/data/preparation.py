"""`prepare`: sources -> token shards. Reads in order, encodes in workers, writes atomically, continues after a stop."""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, fields
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mtraining.data.encoding import EncodeSetup, encode_all
from mtraining.data.options import TRAIN_ON, PrepareOptions, PrepareSummary, flag
from mtraining.data.resolve import resolve_sources
from mtraining.data.shards import (
    FORMAT,
    FORMAT_MASKED,
    HOLDOUT,
    IDS_TOKENIZER,
    META,
    STATE,
    TOKENIZER,
    content_digest,
    shard_file,
    token_dtype,
)
from mtraining.data.sources import Item, Note, Skipped, Source
from mtraining.data.tokenizer import Separators, save_as_it_is, save_tokenizer
from mtraining.data.writer import ShardWriter, write_json
from mtraining.errors import UserError, nearest

# What a stop before prepare.json can leave.
_BEFORE_STATE = {TOKENIZER, TOKENIZER + ".tmp", IDS_TOKENIZER, STATE + ".tmp"}


def prepare(options: PrepareOptions, *, progress: bool = True) -> PrepareSummary:
    """Write (or complete) the token-shard folder `options.out`; see :mod:`mtraining.data.shards` for its files.

    A folder that was begun with the same options is continued after its last finished shard; a finished one is
    returned as it is. The output depends on neither `workers` nor interruptions.

    Raises:
        UserError: bad option or source, no usable document, the folder holds something else, disk full.
    """
    sources = resolve_sources(options)
    existed = options.out.exists()
    fresh = not existed or (options.out.is_dir() and not _foreign(options.out))
    try:
        try:
            state = _begin(options, sources)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UserError(
                f"out '{options.out}' cannot be made: {error.strerror}; name another folder"
            ) from None
        return _prepare(options, sources, state, progress)
    except UserError:
        if fresh:
            _forget(options.out, existed)
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"out '{options.out}': the disk is full; free some space and run again, finished shards are kept"
        ) from error


def _begin(options: PrepareOptions, sources: list[Source]) -> dict[str, Any]:
    """Check the folder against the options, or start it: tokenizer, then prepare.json."""
    out = options.out
    if out.exists() and not out.is_dir():
        raise UserError(f"out '{out}' is a file; name a folder")
    state: dict[str, Any] = {
        "options": options.fingerprint(),
        "signatures": [source.signature for source in sources],
    }
    if (out / STATE).exists():
        try:
            old: dict[str, Any] = json.loads((out / STATE).read_text())
            before, signatures = dict(old["options"]), list(old["signatures"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"out '{out}' has a damaged {STATE}; remove the folder or name another"
            ) from error
        now = state["options"]
        changed = [
            f"{flag(key)} was {before.get(key)!r}, now {now[key]!r}"
            for key in now
            if before.get(key) != now[key]
        ]
        if changed:
            what = "; ".join(changed)
            raise UserError(
                f"out '{out}' was prepared with other options ({what}); name another folder or remove it"
            )
        if signatures != state["signatures"]:
            raise UserError(
                f"out '{out}' was prepared from sources that changed since; name another or remove it"
            )
        return old
    if out.exists() and _foreign(out):
        raise UserError(
            f"out '{out}' is not empty and was not written by prepare; name a new or empty folder"
        )
    temporary, folder, of_ids = out / (TOKENIZER + ".tmp"), out / TOKENIZER, out / IDS_TOKENIZER
    for leftover in (temporary, folder, of_ids):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    state |= asdict(
        save_tokenizer(
            options.tokenizer, options.eos_token, temporary, options.add_bos, options.template_text()
        )
    )
    temporary.rename(folder)
    if options.ids_tokenizer is not None:
        save_as_it_is(options.ids_tokenizer, of_ids)
    write_json(out / STATE, state)
    return state


def _foreign(out: Path) -> bool:
    """Whether the folder holds anything but the leavings of a call that was stopped before prepare.json."""
    return bool({entry.name for entry in out.iterdir()} - _BEFORE_STATE)


def _forget(out: Path, existed: bool) -> None:
    """After a refusal: leave no begun folder behind that would refuse the corrected options; shards are kept."""
    if not out.is_dir() or (out / shard_file(0)).exists():
        return
    for entry in list(out.iterdir()):  # all of it was written by this call
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not existed:
        out.rmdir()


def _prepare(
    options: PrepareOptions, sources: list[Source], state: dict[str, Any], progress: bool
) -> PrepareSummary:
    def held(name: str) -> bool:
        return any(name == pattern or fnmatchcase(name, pattern) for pattern in options.holdout)

    run = _Run(options, sources, state, progress)
    held_out = 0
    if options.holdout:
        _check_holdout(options, sources)
        folder = options.out / HOLDOUT
        folder.mkdir(exist_ok=True)
        held_out = run.write_split(
            folder, lambda entry: isinstance(entry, Item) and held(entry.name), limited=False
        )["documents"]
    meta = run.write_split(
        options.out, lambda entry: not (isinstance(entry, Item) and held(entry.name)), limited=True
    )
    return PrepareSummary(
        path=options.out,
        documents=meta["documents"],
        tokens=meta["tokens"],
        vocab_size=meta["vocab_size"],
        shards=len(meta["shards"]),
        reused_shards=run.reused,
        holdout_documents=held_out,
        separators=meta.get("separators", ""),
        ready_documents=meta.get("ready", 0),
        conversations=meta.get("conversations", 0),
        trained_tokens=sum(shard.get("trained", shard["tokens"]) for shard in meta["shards"]),
        train_on=options.train_on,
        ids_tokenizer=options.ids_tokenizer,
        skipped=[Skipped(**entry) for entry in meta["skipped"]],
        left_aside=[Skipped(**entry) for entry in meta.get("left_aside", ())],
    )


def _refuse_bad(skipped: list[Skipped]) -> None:
    """Refuse the first row that is bad, not left out by choice."""
    bad = next((entry for entry in skipped if not isinstance(entry, Note)), None)
    if bad is not None:
        raise UserError(
            f"'{bad.name}' cannot be used ({bad.reason}); mend it, or leave out and count such rows by --bad-rows skip"
        )


def _check_holdout(options: PrepareOptions, sources: list[Source]) -> None:
    """Every pattern must name a document, and one must be left to train on: a misspelt one would train on the test."""
    names = [entry.name for source in sources for entry in source.items() if isinstance(entry, Item)]
    for pattern in options.holdout:
        if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            near = nearest(pattern, names[:10000], 0.0)
            hint = f"the nearest name is '{near}'" if near else "the sources hold no document"
            raise UserError(f"--holdout '{pattern}' names no document; {hint}")


class _Run:
    def __init__(
        self, options: PrepareOptions, sources: list[Source], state: dict[str, Any], progress: bool
    ) -> None:
        self.options, self.sources, self.state, self.progress = options, sources, state, progress
        self.reused = 0

    def write_split(
        self, folder: Path, keep: Callable[[Item | Skipped], bool], *, limited: bool
    ) -> dict[str, Any]:
        """Write the kept entries to `folder`, after the shards it already has; returns its meta.json."""
        writer = ShardWriter(folder, token_dtype(self.state["vocab_size"]), self.options.shard_tokens)
        self.reused = writer.reused
        if (folder / META).exists():
            finished: dict[str, Any] = json.loads((folder / META).read_text())
            return finished
        options = self.options
        # inf-like limits keep the loop free of None
        most_documents = options.max_documents if limited and options.max_documents else 2**63
        most_tokens = options.max_tokens if limited and options.max_tokens else 2**63
        setup = EncodeSetup(
            tokenizer_folder=(options.out / TOKENIZER).resolve(),
            eos_token_id=int(self.state["eos_token_id"]),
            tokenizer=options.tokenizer,
            # A folder that an older version began has none.
            bos_token_id=self.state.get("bos_token_id"),
            bos_before_ids=bool(options.add_bos),
            train_on=options.train_on or TRAIN_ON[0],
            min_length=options.min_length,
            max_length=options.max_length,
            skip_unknown_ids=options.bad_rows == "skip",
            ids_tokenizer=options.ids_tokenizer,
            ids_tokenizer_folder=(options.out / IDS_TOKENIZER).resolve() if options.ids_tokenizer else None,
        )
        # An entry that is not kept still counts as read, so that positions agree between runs.
        remaining = islice(self._entries(), writer.consumed, None)
        with self._bar() as bar:
            task = (
                bar.add_task(folder.name, total=self._total(), completed=writer.consumed, detail="")
                if bar
                else None
            )
            if writer.documents < most_documents and writer.tokens < most_tokens:
                for encoded in encode_all(
                    (e if keep(e) else None for e in remaining), setup, options.workers
                ):
                    if options.bad_rows == "refuse":
                        _refuse_bad(encoded.skipped)
                    writer.skip(encoded.skipped)
                    if encoded.ids is not None:
                        writer.add(encoded)
                    writer.item_done()
                    if bar is not None and task is not None:
                        detail = f"{writer.tokens:,} tokens, {len(writer.skipped)} skipped"
                        bar.update(task, completed=writer.consumed, detail=detail)
                    if writer.documents >= most_documents or writer.tokens >= most_tokens:
                        break
            writer.item_done(last=True)
        if not writer.documents:
            raise UserError(self._nothing(writer.skipped, folder))
        meta = self._meta(folder, writer)
        write_json(folder / META, meta)
        return meta

    def _separators(self) -> str:
        """What stands around documents, in words; nothing for a folder that an older version began."""
        if "bos_by_default" not in self.state:
            return ""
        kept = {field.name: self.state[field.name] for field in fields(Separators)}
        return Separators(**kept).render(self.options.add_bos)

    def _entries(self) -> Iterator[Item | Skipped]:
        for source in self.sources:
            yield from source.items()

    def _total(self) -> int | None:
        counts = [source.count for source in self.sources]
        return sum(count for count in counts if count is not None) if None not in counts else None

    def _bar(self) -> Any:
        if not self.progress:
            return nullcontext()
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )

    def _nothing(self, skipped: list[Skipped], folder: Path) -> str:
        label = f"sources {', '.join(self.options.sources)}"
        if skipped:
            first = f"the first '{skipped[0].name}' ({skipped[0].reason})"
            return (
                f"{label} gave no usable document: {len(skipped)} skipped, {first}; mend them or name others"
            )
        if self.options.holdout:
            return f"{label}: --holdout leaves no document for '{folder}'; hold out fewer"
        return f"{label} gave no usable document; name others"

    def _meta(self, folder: Path, writer: ShardWriter) -> dict[str, Any]:
        aside = [entry for source in self.sources for entry in source.left_aside]
        return {
            "format": FORMAT_MASKED if any(writer.masked) else FORMAT,
            "tokenizer": self.options.tokenizer,
            "tokenizer_folder": TOKENIZER if folder == self.options.out else f"../{TOKENIZER}",
            "vocab_size": self.state["vocab_size"],
            "eos_token_id": self.state["eos_token_id"],
            "bos_token_id": self.state.get("bos_token_id"),
            "separators": self._separators(),
            "ready": writer.ready,
            "conversations": writer.conversations,
            "max_token_id": writer.max_token_id,
            "dtype": writer.dtype.str,
            "documents": writer.documents,
            "tokens": writer.tokens,
            "shards": writer.shards,
            "content": content_digest(
                folder, [shard["tokens"] for shard in writer.shards], writer.dtype, writer.masked
            ),
            "sources": list(self.options.sources),
            "options": self.state["options"],
            "left_aside": [asdict(entry) for entry in aside],
            "skipped_counts": dict(Counter(entry.reason for entry in writer.skipped)),
            "skipped": [asdict(entry) for entry in writer.skipped],
        }
