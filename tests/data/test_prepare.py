"""The prepared folder: shards, limits, holdout, worker independence, interruption and refusal."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared import tree, write_rows

from mtraining.data import PrepareOptions, TokenShards, prepare
from mtraining.data import writer as writer_module
from mtraining.errors import UserError

TEXTS = {f"doc-{n:02}": "" if n in (3, 11) else f"{n} " * (5 + 7 * n % 40) for n in range(20)}
REAL = [name for name in TEXTS if TEXTS[name]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", TEXTS)


def options(source: Path, out: Path, **changes: Any) -> PrepareOptions:
    return PrepareOptions(
        **{"sources": (source,), "out": out, "name_column": "id", "shard_tokens": 200, **changes}
    )


def test_shards_hold_whole_documents_in_order(tmp_path: Path, source: Path) -> None:
    summary = prepare(options(source, tmp_path / "out"), progress=False)
    shards = TokenShards(tmp_path / "out")
    assert {name: bytes(ids[:-1].tolist()).decode() for name, ids in shards.documents()} == {
        name: TEXTS[name] for name in REAL
    }
    assert [entry.name for entry in summary.skipped] == ["doc-03", "doc-11"]
    sizes = [shard["tokens"] for shard in shards.meta["shards"]]
    assert len(sizes) == summary.shards > 3
    assert min(sizes[:-1]) >= 200  # every shard but the last is full
    assert sum(sizes) == shards.num_tokens == summary.tokens
    assert (tmp_path / "out" / "tokens-00000.bin").stat().st_size == 2 * sizes[0]


def test_output_does_not_depend_on_workers(tmp_path: Path, source: Path) -> None:
    one = prepare(options(source, tmp_path / "one", max_tokens=900), progress=False)
    two = prepare(options(source, tmp_path / "two", max_tokens=900, workers=2), progress=True)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert one.skipped == two.skipped and one.tokens == two.tokens


def test_every_so_many_documents(tmp_path: Path, source: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", {"x": "1", "y": "2", "z": "3"})
    taken = options(source, tmp_path / "out", sources=(source, other), every=3)
    summary = prepare(taken, progress=False)
    assert [name for name, _ in TokenShards(tmp_path / "out").documents()] == [
        *[name for number, name in enumerate(TEXTS) if number % 3 == 0 and TEXTS[name]], "x"]  # fmt: skip
    assert [entry.name for entry in summary.skipped] == ["doc-03"]
    with pytest.raises(UserError, match="--holdout 'y' names no document"):
        prepare(options(source, tmp_path / "none", sources=(other,), every=3, holdout=("y",)), progress=False)
    with pytest.raises(UserError, match="--every is 0; it must be at least 1"):
        options(source, tmp_path, every=0)


def test_limits_end_after_the_document_that_reaches_them(tmp_path: Path, source: Path) -> None:
    assert prepare(options(source, tmp_path / "five", max_documents=5), progress=False).documents == 5
    five = TokenShards(tmp_path / "five")
    assert [name for name, _ in five.documents()] == REAL[:5]
    enough = int(five.lengths[:3].sum())
    for limit, documents in ((enough, 3), (enough + 1, 4)):
        summary = prepare(options(source, tmp_path / f"tokens{limit}", max_tokens=limit), progress=False)
        assert summary.documents == documents


def test_holdout_is_a_folder_of_its_own(tmp_path: Path, source: Path) -> None:
    chosen = options(source, tmp_path / "out", holdout=("doc-07", "doc-1*"), max_documents=6)
    summary = prepare(chosen, progress=False)
    held = [name for name in REAL if name == "doc-07" or name.startswith("doc-1")]
    shards, holdout = TokenShards(tmp_path / "out"), TokenShards(tmp_path / "out" / "holdout")
    assert [name for name, _ in holdout.documents()] == held
    assert [name for name, _ in shards.documents()] == [name for name in REAL if name not in held][:6]
    assert summary.holdout_documents == len(held)
    assert holdout.tokenizer_path == shards.tokenizer_path
    assert (holdout.tokenizer_path / "tokenizer.json").exists()


def test_holdout_that_names_nothing_is_refused(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match="holdout 'dok-07' names no document; the nearest name is 'doc-07'"):
        prepare(options(source, tmp_path / "out", holdout=("dok-07",)), progress=False)
    with pytest.raises(UserError, match="holdout leaves no document"):
        prepare(options(source, tmp_path / "out", holdout=("doc-*",)), progress=False)
    assert not (tmp_path / "out").exists()


def test_large_vocabulary_is_stored_in_uint32(tmp_path: Path, source: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"</s>": 0, **{f"w{n}": n for n in range(1, 70_000)}, "7": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    chosen = options(source, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"), eos_token="</s>")
    assert prepare(chosen, progress=False).vocab_size == 70_001
    shards = TokenShards(tmp_path / "out")
    document = shards.document(REAL.index("doc-07"))
    assert document.dtype == np.uint32
    assert set(document[:-1].tolist()) == {70_000} and document[-1] == 0
    assert shards.max_token_id == 70_000


HOLDOUT = ("doc-07", "doc-1*")


def prepare_and_die(chosen: PrepareOptions, files_done: int) -> None:
    """SIGKILL this process before the rename number files_done + 1: each file appears by one rename."""
    replace, left = os.replace, files_done

    def replace_or_die(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    writer_module.os.replace = replace_or_die
    prepare(chosen, progress=False)


@pytest.mark.parametrize(("files_done", "holdout"), [(0, ()), (1, ()), (8, ()), (3, HOLDOUT), (9, HOLDOUT)])
def test_killed_run_continues_to_the_same_folder(
    tmp_path: Path, source: Path, files_done: int, holdout: tuple[str, ...]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    prepare(options(source, whole, holdout=holdout), progress=False)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(
        target=prepare_and_die, args=(options(source, broken, holdout=holdout), files_done)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    if files_done:
        with pytest.raises(UserError, match=r"unfinished; run the same `mtraining prepare` again"):
            TokenShards(broken)
    kept = {path: path.stat().st_mtime_ns for path in broken.glob("tokens-*.bin")}
    finished = len(list(broken.glob("shard-*.json")))
    summary = prepare(options(source, broken, holdout=holdout), progress=False)
    assert tree(broken) == tree(whole)
    assert summary.reused_shards == finished
    for number in range(finished):  # finished shards were not written again
        path = broken / f"tokens-{number:05}.bin"
        assert path.stat().st_mtime_ns == kept[path]
    if files_done == 8:  # prepare.json, then three files a shard
        assert finished == 2
    # a held-out document's own troubles belong to the holdout folder
    assert [entry.name for entry in summary.skipped] == (["doc-03"] if holdout else ["doc-03", "doc-11"])


def test_finished_folder_is_returned_as_it_is(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(options(source, tmp_path / "out"), progress=False)

    def no_write(*_: Any) -> None:
        raise AssertionError("wrote again")

    monkeypatch.setattr(writer_module, "write_atomic", no_write)
    again = prepare(options(source, tmp_path / "out", workers=2), progress=False)
    assert again.reused_shards == first.shards == again.shards
    assert (again.tokens, again.skipped) == (first.tokens, first.skipped)


def test_other_options_or_sources_are_refused(tmp_path: Path, source: Path) -> None:
    prepare(options(source, tmp_path / "out"), progress=False)
    before = tree(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"other options \(--max-tokens was None, now 5\); name another folder"
    ):
        prepare(options(source, tmp_path / "out", max_tokens=5), progress=False)
    os.utime(source, ns=(1, 1))
    with pytest.raises(UserError, match="sources that changed since"):
        prepare(options(source, tmp_path / "out"), progress=False)
    assert tree(tmp_path / "out") == before


def test_foreign_folder_is_left_alone(tmp_path: Path, source: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="not empty and was not written by prepare"):
        prepare(options(source, tmp_path / "mine"), progress=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file; name a folder"):
        prepare(options(source, source), progress=False)
    assert source.is_file()


def test_damaged_state_is_refused(tmp_path: Path, source: Path) -> None:
    prepare(options(source, tmp_path / "out"), progress=False)
    (tmp_path / "out" / "prepare.json").write_text('{"options": 3}')
    with pytest.raises(UserError, match=r"damaged prepare\.json"):
        prepare(options(source, tmp_path / "out"), progress=False)


def test_full_disk_keeps_finished_shards(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    prepare(options(source, whole), progress=False)
    real = os.fsync
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module.os, "fsync", fsync)
        with pytest.raises(UserError, match="disk is full; free some space and run again"):
            prepare(options(source, tmp_path / "out"), progress=False)
    assert (tmp_path / "out" / "shard-00000.json").exists()
    assert prepare(options(source, tmp_path / "out"), progress=False).reused_shards == 1
    assert tree(tmp_path / "out") == tree(whole)


def test_a_dead_worker_is_reported(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtraining.data import encoding

    monkeypatch.setattr(encoding, "_start_worker", _die)
    with pytest.raises(UserError, match="a tokenising process died"):
        prepare(options(source, tmp_path / "out", workers=2), progress=False)


def _die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
