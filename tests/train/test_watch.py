"""The watch between ranks: death is told from slowness, and whatever it meets, it ends the process."""

from __future__ import annotations

import gc
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from mtraining.errors import RunStopped
from mtraining.train import backstop, launch, watch
from mtraining.train.checkpoint import Checkpointer
from mtraining.train.peers import Door, Identity, Line, OsProcess, children, this_machine
from mtraining.train.store import CheckpointStore
from processes import run_command, started, wait_for

# The others' identity is published by hand in these tests; "watch" keys of the first run of a process.
PREFIX = "mtraining/watch/0/0"
WHO, BEAT, VERDICT = f"{PREFIX}/who/1", f"{PREFIX}/beat/1", f"{PREFIX}/verdict"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of ranks 0 and 1, at which this process is rank 0; the watch's beats are 0.01 s apart."""
    made = dist.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(made.port))
    monkeypatch.setattr(watch, "launcher_store", lambda *_: dist.TCPStore("localhost", made.port))
    monkeypatch.setattr(watch, "_numbers", itertools.repeat(0))
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.1)
    return made


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes that the process would have left with."""
    codes: list[int] = []
    monkeypatch.setattr(watch, "exit_now", codes.append)
    return codes


@contextmanager
def watching(tmp_path: Path, silence_seconds: float = 1e9) -> Iterator[watch._Watch]:
    made = watch._Watch(tmp_path, 0, 2, 1e9, silence_seconds)
    try:
        yield made
    finally:
        made._leaving.set()


def rounds(watched: watch._Watch, count: int) -> None:
    """Wait until the watch has looked `count` times more."""
    wanted = watched._rounds + count
    wait_for(lambda: watched._rounds >= wanted, 60)


def publish(store: dist.TCPStore, identity: Identity) -> None:
    store.set(WHO, json.dumps(asdict(identity)))


def listen(capfd: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The lines on stderr so far."""
    told = [""]

    def lines() -> list[str]:
        told[0] += capfd.readouterr().err
        return told[0].splitlines()

    return lines


def process_of(pid: int) -> OsProcess:
    return next(each for each in children(os.getpid()) if each.pid == pid)


def test_a_stopped_rank_is_waited_for_and_a_killed_one_is_named(
    tmp_path: Path, store: dist.TCPStore, ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    """The other rank never beats: 200 of the watch's beats, which were once 200 s and limited to 15."""
    with started(["sleep", "600"]) as other:
        publish(store, Identity(this_machine(), process_of(other.pid)))
        other.signal(signal.SIGSTOP)
        with watching(tmp_path) as watched:
            rounds(watched, 200)
            assert ended == [] and not store.check([VERDICT])
            other.signal(signal.SIGKILL)
            wait_for(lambda: ended, 60)
    assert ended[0] == 1
    assert capfd.readouterr().err == (
        "error: rank 1 died: its process is gone, so rank 0 ends too; there is no checkpoint yet.\n"
    )


DOOR = """
import json, sys, time
from dataclasses import asdict
from mtraining.train.checkpoint import Checkpointer
from mtraining.train.peers import Door
print(json.dumps(asdict(Door().identity)), flush=True)
time.sleep(600)
"""


def test_a_rank_of_another_machine_is_known_by_its_connection(
    tmp_path: Path, store: dist.TCPStore, ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its process number says nothing here: the one published is this process's own, which lives."""
    with started([sys.executable, "-c", DOOR]) as other:
        wait_for(lambda: "}" in other.so_far().stdout, alive=[other])
        fields = json.loads(other.so_far().stdout)
        identity = Identity(**{**fields, "process": OsProcess.here(), "machine": "elsewhere"})
        assert identity.port > 0
        publish(store, identity)
        with watching(tmp_path) as watched:
            wait_for(lambda: watched._line is not None and watched._line._known, 60)
            other.signal(signal.SIGSTOP)
            rounds(watched, 100)
            assert ended == [] and not store.check([VERDICT])
            other.signal(signal.SIGKILL)
            wait_for(lambda: ended, 60)
    told = "error: rank 1 died: the connection to its process broke, so rank 0 ends too;"
    assert capfd.readouterr().err.startswith(told)


def test_what_cannot_be_told_from_slowness_ends_the_run_after_the_silence(
    tmp_path: Path, store: dist.TCPStore, ended: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with watching(tmp_path, silence_seconds=0.5) as watched:
        for beat in range(100):  # signs of life, over longer than the silence
            store.set(BEAT, f"{beat} somewhere")
            rounds(watched, 1)
        assert ended == []
        wait_for(lambda: ended, 60)
    assert capfd.readouterr().err.startswith(
        "error: rank 1 gave no sign of life for 1 s (distributed.silence_seconds): it is stopped, or "
    )


def test_a_rank_that_is_done_may_end(tmp_path: Path, store: dist.TCPStore, ended: list[int]) -> None:
    store.set(f"{PREFIX}/done/1", "")
    publish(store, Identity(this_machine(), replace(OsProcess.here(), start=1)))
    with watching(tmp_path) as watched:
        rounds(watched, 20)
    assert ended == [] and not store.check([VERDICT])


def test_a_watch_that_was_stopped_itself_blames_nobody() -> None:
    """Its own beats are the clock, so hours between two of them count as one."""
    quiet = watch._Quiet()
    assert [quiet.seconds(1, "same", beat) for beat in range(3)] == [
        0.0,
        watch.BEAT_SECONDS,
        2 * watch.BEAT_SECONDS,
    ]
    assert quiet.seconds(1, "new", 3) == 0.0
    assert quiet.seconds(2, "same", 3) == 0.0


def test_a_store_that_is_slow_is_waited_for_and_one_that_is_gone_is_not(
    tmp_path: Path,
    store: dist.TCPStore,
    ended: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    tries: list[int] = []

    def slow(*_: Any) -> Any:
        tries.append(0)
        raise dist.DistStoreError("wait timeout")

    with socket.socket() as launcher, watching(tmp_path):
        launcher.bind(("localhost", 0))
        launcher.listen()
        monkeypatch.setenv("MASTER_PORT", str(launcher.getsockname()[1]))
        monkeypatch.setattr(watch, "launcher_store", slow)
        monkeypatch.setattr(dist.TCPStore, "check", slow)
        wait_for(lambda: len(tries) > 20, 60)
        assert ended == []
        launcher.close()
        wait_for(lambda: ended, 60)
    assert capfd.readouterr().err.startswith(
        "error: the launcher (or rank 0), which keeps the ranks in touch, has ended (wait timeout), so rank 0 ends too"
    )


def test_a_call_of_the_store_that_never_returns_ends_after_the_silence(
    tmp_path: Path,
    store: dist.TCPStore,
    ended: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    release = threading.Event()
    monkeypatch.setattr(dist.TCPStore, "check", lambda *_: release.wait())
    with watching(tmp_path, silence_seconds=0.5):
        wait_for(lambda: ended, 60)
    release.set()
    assert "keeps the ranks in touch, gave no sign of life" in capfd.readouterr().err


def test_the_end_comes_also_where_it_cannot_be_told(
    tmp_path: Path, store: dist.TCPStore, ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> str:
        raise OSError("the terminal is gone")

    monkeypatch.setattr(watch, "way_on", broken)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    with watching(tmp_path):
        store.set(VERDICT, "rank 1 failed")
        wait_for(lambda: ended, 60)
    assert ended == [1]


def test_a_launcher_that_is_gone_is_not_tried_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("localhost", 0))
        port = str(nobody.getsockname()[1])
    for name, value in (("MASTER_ADDR", "localhost"), ("MASTER_PORT", port), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError):
        watch.launcher_store(0.5)
    monkeypatch.setattr(launch, "launcher_store", lambda: watch.launcher_store(0.5))
    assert not launch._first_to_tell()


def test_an_error_that_is_no_exception_is_told_too(tmp_path: Path, store: dist.TCPStore) -> None:
    """As PyTorch's CheckpointException is none."""

    class OnPurpose(BaseException):
        pass

    with pytest.raises(OnPurpose), watch.watched(tmp_path, 0, 2, stall_seconds=1e9, silence_seconds=1e9):
        raise OnPurpose("so it is")
    assert store.get(VERDICT).decode() == "rank 0 failed (OnPurpose: so it is)"


def test_a_full_pipe_does_not_hold_the_exit_up() -> None:
    code = """
import os, sys, threading, time
from mtraining.train.leaving import exit_now
_, full = os.pipe()
sys.stdout = os.fdopen(full, "w")
def write():
    while True:
        print("x" * 100_000, flush=True)
threading.Thread(target=write, daemon=True).start()
time.sleep(0.5)
exit_now(3)
"""
    run_command([sys.executable, "-c", code], code=3)


def test_a_process_is_known_by_its_start_and_gone_before_it_is_waited_for() -> None:
    assert not OsProcess.here().gone()
    assert replace(OsProcess.here(), start=OsProcess.here().start + 1).gone()
    with started(["sleep", "600"]) as other:
        process = process_of(other.pid)
        assert not process.gone()
        os.kill(process.pid, signal.SIGSTOP)
        wait_for(lambda: "T (stopped)" in Path(f"/proc/{process.pid}/status").read_text(), 60)
        assert not process.gone()
        os.kill(process.pid, signal.SIGKILL)
        wait_for(process.gone, 60)
        assert Path(f"/proc/{process.pid}").exists()  # nobody has asked for its exit code


def test_a_stranger_on_the_port_is_not_taken_for_the_rank() -> None:
    """A connection counts once the rank's token came; before that, neither an end nor a refusal is a death."""
    with socket.socket() as stranger:
        stranger.bind(("localhost", 0))
        stranger.listen()
        line = Line(Identity("elsewhere", OsProcess.here(), "localhost", stranger.getsockname()[1], "token"))
        assert not line.gone()
        visitor, _ = stranger.accept()
        visitor.sendall(b"hello")
        assert not line.gone()
        visitor.close()
        stranger.close()
        for _ in range(5):
            time.sleep(0.02)
            assert not line.gone()
    assert line.problem is not None and "refused" in line.problem


def test_a_connection_that_the_network_broke_is_made_again(store: dist.TCPStore) -> None:
    door = Door()
    line = Line(replace(door.identity, machine="elsewhere"))
    wait_for(lambda: not line.gone() and line._known, 60)
    door._visitors[0].close()
    wait_for(lambda: not line.gone() and len(door._visitors) == 2, 60)
    assert line.problem is None
    line.close()
    door.close()


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Two processes that the backstop takes for ranks of this launcher; its times are 0.2 s and 0.4 s."""
    with started(["sleep", "600"]) as first, started(["sleep", "600"]) as second:
        pids = {first.pid, second.pid}
        monkeypatch.setattr(backstop, "_is_spawned", lambda process: process.pid in pids)
        for name, seconds in (("LOOK", 0.02), ("KILL", 0.2), ("LEAVE", 0.4)):
            monkeypatch.setattr(backstop, f"{name}_SECONDS", seconds)
        yield [first, second]


def test_a_launcher_that_waits_for_ever_is_left(
    tmp_path: Path,
    two_ranks: list[Any],
    ended: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(backstop, "exit_now", ended.append)
    with backstop.backstop(lambda: "go on", tmp_path):
        time.sleep(0.3)
        assert two_ranks[1].poll() is None
        two_ranks[0].signal(signal.SIGKILL)
        wait_for(lambda: two_ranks[1].poll() == -signal.SIGKILL, 60)
        wait_for(lambda: ended, 60)
    assert ended[0] == 1
    assert capfd.readouterr().err.startswith(
        f"error: a rank (process {two_ranks[0].pid}) died, and its launcher still"
    )


def test_a_rank_that_is_done_leaves_the_others_alone(
    tmp_path: Path, two_ranks: list[Any], ended: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backstop, "exit_now", ended.append)
    (tmp_path / f"done.{two_ranks[0].pid}").touch()
    with backstop.backstop(lambda: "go on", tmp_path):
        time.sleep(0.2)
        two_ranks[0].signal(signal.SIGKILL)
        time.sleep(0.8)
        assert two_ranks[1].poll() is None
    assert ended == []


def test_a_launcher_tells_why_a_rank_lacked_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = tmp_path / "reason.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(reason))
    launch.get_error_handler().record_exception(
        RunStopped("a process that reads data for rank 1 ended early")
    )
    cause = launch._cause(
        1, ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(reason)), tmp_path
    )
    assert (str(cause), cause.code) == ("a process that reads data for rank 1 ended early", 1)  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [ValueError("out of luck"), dist.DistBackendError("NCCL error")])
def test_a_rank_that_fails_names_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    """Two ranks as two watches on one store: the one that fails is named, also when it looked like a victim first; and
    the launcher names it too, though it is the other rank that it sees end."""
    store = dist.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(watch, "launcher_store", lambda *_: dist.TCPStore("localhost", store.port))
    for name in ("BEAT_SECONDS", "SUSPECT_SECONDS", "GRACE_SECONDS"):
        monkeypatch.setattr(watch, name, getattr(watch, name) / 20)
    monkeypatch.setattr(watch, "_numbers", itertools.repeat(0))
    reason = tmp_path / "reason.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(reason))
    ended: list[int] = []

    def fail() -> None:
        time.sleep(0.2)
        raise error

    monkeypatch.setattr(watch, "exit_now", ended.append)
    watch._Watch(tmp_path, 0, 2, 600, 600)
    with pytest.raises(type(error)), watch.watched(tmp_path, 1, 2, stall_seconds=600, silence_seconds=600):
        fail()
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended[:1] == [1]
    told = capfd.readouterr().err.splitlines()[0]
    assert told.startswith(
        f"error: rank 1 failed ({type(error).__name__}: {error}), so rank 0 ends too; there is no"
    )
    seen = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(reason))
    assert str(launch._cause(0, seen, watch.way_on(tmp_path))).startswith(
        f"rank 1 failed ({type(error).__name__}: {error}), so the other ranks were ended; there is no"
    )


def test_a_stall_says_where_each_rank_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Four ranks as four watches on one store; three wait for the one that hangs elsewhere. Told once."""
    store = dist.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setattr(watch, "launcher_store", lambda *_: dist.TCPStore("localhost", store.port))
    monkeypatch.setattr(watch, "_numbers", itertools.repeat(0))
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(watch, "PACKAGE", Path(__file__).parent)
    watches: list[watch._Watch] = []
    end = threading.Event()

    def waits() -> None:
        end.wait()

    def reads_data() -> None:
        end.wait()

    def rank(number: int) -> None:
        watches.append(watch._Watch(tmp_path, number, 4, 0.4, 600))
        (reads_data if number == 2 else waits)()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    told_so_far = listen(capfd)
    try:
        wait_for(told_so_far, 60)
        time.sleep(0.6)  # longer than the stall: it could be told again
    finally:
        end.set()
        for thread in threads:
            thread.join()
        for each in watches:
            each._leaving.set()
    told = told_so_far()
    assert len(told) == 1
    hung, waiting = (rf"test_watch\.py:\d+ \({name}\)" for name in ("reads_data", "waits"))
    pattern = rf"warning: rank 0 has not moved for 0 s; rank 2 in {hung}; ranks 0-1, 3 in {waiting}\. A collective .*"
    assert re.fullmatch(pattern, told[0])


@pytest.mark.parametrize("on", [True, False])
def test_no_garbage_is_collected_while_threads_are_looked_at(
    on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.11 could stand still for good if it were. What was switched off stays off, also after an error."""
    seen = []

    def frames() -> dict[int, Any]:
        seen.append(gc.isenabled())
        if len(seen) == 2:
            raise RuntimeError
        return {}

    monkeypatch.setattr(sys, "_current_frames", frames)
    was = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        assert watch.whereabouts(threading.get_ident()) == "code of others"
        assert gc.isenabled() == on
        with pytest.raises(RuntimeError):
            watch.whereabouts(threading.get_ident())
        assert seen == [False, False] and gc.isenabled() == on
    finally:
        (gc.enable if was else gc.disable)()


def test_a_stall_names_a_rank_that_says_nothing(
    tmp_path: Path, store: dist.TCPStore, capfd: pytest.CaptureFixture[str]
) -> None:
    store.set(BEAT, "7 data/loader.py:3 (read)")
    made = watch._Watch(tmp_path, 0, 2, 0.1, 1e9)
    told = listen(capfd)
    try:
        wait_for(told, 60)
    finally:
        made._leaving.set()
    assert "; rank 1 in silence (stopped, or very slow), last in data/loader.py:3 (read)" in told()[0]


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4711"


@pytest.mark.parametrize(
    ("error", "ends_the_run"),
    [
        (RuntimeError(GLOO), True),
        (dist.DistBackendError("NCCL error"), True),
        (CheckpointException("", {1: (RuntimeError(GLOO), StackSummary())}), True),
        (OSError(28, "No space left on device", "/data/gloo/run"), False),
        (CheckpointException("", {1: (OSError(28, "No space"), StackSummary())}), False),
        (RuntimeError("a folder [gloo] is full"), False),
    ],
    ids=["gloo", "nccl", "gloo on rank 1", "disk", "disk on rank 1", "folder"],
)
def test_a_save_that_lost_a_rank_is_not_taken_for_a_full_disk(
    tmp_path: Path, error: BaseException, ends_the_run: bool
) -> None:
    """A group of processes that has lost one fails at every later save too."""
    told: list[str] = []
    saves: Any = Checkpointer.__new__(Checkpointer)
    saves.store, saves._tell, saves._process = (
        CheckpointStore(tmp_path),
        told.append,
        SimpleNamespace(is_main=True),
    )
    saves._pending = SimpleNamespace(step=1, future=Future())
    saves._pending.future.set_exception(error)
    assert watch.failed_collective(error) is ends_the_run
    with pytest.raises(type(error)) if ends_the_run else nullcontext():
        saves.finish()
    assert len(told) == (0 if ends_the_run else 1)
