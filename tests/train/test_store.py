"""The checkpoint folder: atomic, keeps the last N, knows a half-written one."""

from pathlib import Path

import pytest

from mtraining.errors import UserError
from mtraining.train.digest import digest_of
from mtraining.train.store import CheckpointStore, FileRecord, Manifest, problem, require_complete


def save(store: CheckpointStore, step: int, keep_last: int = 10) -> Path:
    partial = store.begin(step)
    (partial / "__0_0.distcp").write_bytes(b"tensor" * 10)
    files = {"__0_0.distcp": FileRecord(60, digest_of(partial / "__0_0.distcp"))}
    return store.commit(step, Manifest(step=step, world=1, shapes={}), files, keep_last)


def test_the_last_n_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3, 4):
        save(store, step, keep_last=2)
    assert [path.name for path in store.complete()] == ["step_00000003", "step_00000004"]
    assert store.latest() == store.path(4)


def test_an_unfinished_save_is_not_a_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    store.begin(2)
    assert store.latest() == store.path(1)
    assert store.broken() == {store.partial(2): "it was still being written"}
    with pytest.raises(
        UserError, match=r"step_00000002.partial is half-written .* newest complete one is .*00000001"
    ):
        require_complete(store.partial(2))


@pytest.mark.parametrize("harm", ["cut", "lost", "no manifest", "damaged manifest"])
def test_damage_is_seen(tmp_path: Path, harm: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1)
    path = save(store, 2)
    assert problem(path) is None
    if harm == "cut":
        (path / "__0_0.distcp").write_bytes(b"ten")
        reason = "__0_0.distcp has 3 of 60 bytes"
    elif harm == "lost":
        (path / "__0_0.distcp").unlink()
        reason = "__0_0.distcp is missing"
    elif harm == "no manifest":
        (path / "manifest.json").unlink()
        reason = "it has no manifest.json"
    else:
        (path / "manifest.json").write_text('{"step": ', encoding="utf-8")
        reason = "its manifest.json is damaged"
    assert problem(path) == reason
    assert store.latest() == store.path(1)


def test_old_checkpoints_go_only_after_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 1, keep_last=1)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="No space"):
        save(store, 2, keep_last=1)
    assert store.latest() == store.path(1)


def test_an_absent_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        require_complete(tmp_path / "nowhere")
