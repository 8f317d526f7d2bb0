"""Signals that ask a run to stop: what one process makes of them, and what a launcher tells."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from test_launch import COMMAND, write_recipe
from tiny_run import tiny_config
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure, get_error_handler

from mtraining.errors import SAVED, RunStopped
from mtraining.train import launch, stop, watch
from mtraining.train.metrics import read_metrics
from mtraining.train.peers import OsProcess, children
from mtraining.train.store import CheckpointStore
from processes import started, wait_for


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes that the process would have left with."""
    codes: list[int] = []
    monkeypatch.setattr(stop, "exit_now", codes.append)
    return codes


@pytest.mark.parametrize("number", stop.SIGNALS)
def test_a_signal_asks_once_there_is_something_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: list[int], number: int
) -> None:
    """And the same one again, but not its echo by a launcher, ends the process."""
    before = [signal.getsignal(each) for each in stop.SIGNALS]
    monkeypatch.setattr(stop, "SAME_SECONDS", 0.3)
    told: list[str] = []
    with stop.stoppable(tmp_path) as request:
        request._tell = told.append
        request.defer()
        for _ in range(2):
            os.kill(os.getpid(), number)
        wait_for(lambda: told)
        assert request.flag == 1
        time.sleep(0.4)
        assert not ended
        os.kill(os.getpid(), number)
        wait_for(lambda: ended)
    assert ended == [128 + number]
    assert len(told) == 1
    assert [signal.getsignal(each) for each in stop.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_before_the_first_step_a_signal_ends_the_process_with_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ended: list[int]
) -> None:
    with stop.stoppable(tmp_path) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: ended)
    assert ended == [143]
    assert request.flag == 0
    assert capsys.readouterr().err == (
        "error: stopped by SIGTERM before its first step was done, so there is nothing to save; there is no checkpoint "
        "yet.\n"
    )


def test_the_launchers_sigterm_after_a_ranks_death_asks_for_nothing(tmp_path: Path, ended: list[int]) -> None:
    """Also where nobody has waited for the dead one yet."""
    with started(["sleep", "600"]) as sibling:
        request = stop.StopRequest(tmp_path)
        request.defer()
        request._siblings = [
            OsProcess.here(),
            *(each for each in children(os.getpid()) if each.pid == sibling.pid),
        ]
        assert len(request._siblings) == 2
        request.hear(signal.SIGTERM)
        assert not ended
        os.kill(sibling.pid, signal.SIGKILL)
        wait_for(request._siblings[1].gone)
        request.hear(signal.SIGTERM)
        assert ended == [143]


def test_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    found: list[object] = []

    def run() -> None:
        with stop.stoppable(tmp_path):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_a_launcher_tells_of_a_signal_that_ended_a_rank_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = tmp_path / "reason.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(reason))
    get_error_handler().record_exception(RunStopped("stopped by SIGTERM, which came twice, at once", 143))
    seen = ProcessFailure(local_rank=0, pid=1, exitcode=143, error_file=str(reason))
    cause = launch._cause(0, seen, watch.way_on(tmp_path))
    assert (str(cause), cause.code) == ("stopped by SIGTERM, which came twice, at once", 143)  # type: ignore[union-attr]


def test_a_launcher_without_ranks_stops_at_once(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starting(*args: object) -> object:
        return lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(launch, "elastic_launch", starting)
    monkeypatch.setattr(launch, "ranks_of", lambda launcher: [])
    with pytest.raises(RunStopped, match="stopped by SIGTERM; there is no checkpoint yet") as stopped:
        launch.launch(tiny_config(tmp_path, shards, parallel={"cp": 2}), 2)
    assert stopped.value.code == 143


@pytest.mark.slow
def test_a_launched_run_that_is_told_to_stop_saves_and_says_so(tmp_path: Path, shards: Path) -> None:
    train = {"steps": 100_000, "kernel": "reference", "batch_size": 1, "micro_batch_size": 1}
    recipe = write_recipe(tmp_path, shards, parallel={"cp": 2}, train=train, checkpoint={"every": 0})
    run = tmp_path / "run"
    with started([*COMMAND, recipe, "--nproc", "2"]) as process:
        wait_for(
            lambda: len(read_metrics(run)) > 1, alive=[process]
        )  # so both ranks have done their first step
        process.signal(signal.SIGTERM)
        ended = process.wait()
    latest = CheckpointStore(run).latest()
    done = len(read_metrics(run))
    assert latest == CheckpointStore(run).path(done)
    assert ended.stderr == (
        f"stopped by a signal after step {done}, saved in {latest}: run the same command again to go on from it.\n"
    )
    assert ended.returncode == SAVED


def test_a_rank_that_waited_in_vain_names_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = tmp_path / "reason.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(reason))
    get_error_handler().record_exception(RuntimeError("[gloo:129] Timed out waiting 5000ms for send"))
    seen = ProcessFailure(local_rank=1, pid=1, exitcode=1, error_file=str(reason))
    assert str(launch._cause(1, seen, watch.way_on(tmp_path))) == (
        "rank 1 failed ([gloo:129] Timed out waiting 5000ms for send; another rank hangs, or needs longer than "
        "distributed.timeout_seconds), so the other ranks were ended; there is no checkpoint yet."
    )
    aborted = ProcessFailure(local_rank=1, pid=1, exitcode=-signal.SIGABRT, error_file=str(tmp_path / "none"))
    assert "killed by SIGABRT (as NCCL does where" in str(launch._cause(1, aborted, watch.way_on(tmp_path)))
