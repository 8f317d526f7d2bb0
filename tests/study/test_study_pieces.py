"""Pieces of a study: done once, in order, saved when time is over, and never under other settings."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from mtraining.errors import SAVED, UserError


def runner(tmp_path: Path, minutes: float | None = None, places: int = 1) -> tuple[Any, list[str]]:
    from pieces import Runner

    told: list[str] = []
    return Runner(tmp_path, ["0"] * places, minutes, told.append), told


def piece(name: str, code: str, after: tuple[str, ...] = (), **settings: Any) -> Any:
    from pieces import Piece

    return Piece(name, ("-c", code), settings, after)


def test_pieces_run_once_and_after_what_they_need(tmp_path: Path) -> None:
    log = tmp_path / "order"
    code = "import os; open({!r}, 'a').write({!r} + os.environ['CUDA_VISIBLE_DEVICES'])"
    pieces = [
        piece("second", code.format(str(log), "b"), after=("first",)),
        piece("first", code.format(str(log), "a")),
    ]
    assert runner(tmp_path)[0].run(pieces)
    assert log.read_text() == "a0b0"
    assert runner(tmp_path)[0].run(pieces)
    assert log.read_text() == "a0b0"
    assert json.loads((tmp_path / "done" / "first.json").read_text())["seconds"] >= 0


def test_a_piece_of_other_settings_is_refused(tmp_path: Path) -> None:
    assert runner(tmp_path)[0].run([piece("one", "pass", steps=1)])
    with pytest.raises(UserError, match="has one of another plan; give another folder"):
        runner(tmp_path)[0].run([piece("one", "pass", steps=2)])


def test_a_failure_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    pieces = [
        piece("bad", "import sys; print('error: no such thing'); sys.exit(2)"),
        piece("after", "pass", after=("bad",)),
        piece("good", "pass"),
    ]
    with pytest.raises(UserError, match=r"bad failed \(error: no such thing\)"):
        runner(tmp_path)[0].run(pieces)
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["good.json"]


def test_what_time_runs_out_for_is_asked_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pieces as module

    monkeypatch.setattr(module, "LEAST", 0)
    saved = tmp_path / "saved"
    code = (
        "import signal, sys, time, pathlib\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(saved)!r}).touch(), sys.exit({SAVED})))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(600)"
    )
    made, told = runner(tmp_path)
    # Time is over once the piece has begun, however long that takes here.
    monkeypatch.setattr(made, "_left", lambda: 0.0 if (tmp_path / "ready").exists() else 60.0)
    assert not made.run([piece("long", code), piece("never", "pass", after=("long",))])
    assert saved.exists()
    assert not (tmp_path / "done").exists()
    assert any("long stopped" in line and "saved" in line for line in told)


def test_a_request_to_stop_ends_what_runs(tmp_path: Path) -> None:
    import threading

    made, _ = runner(tmp_path)
    code = f"import pathlib, time; pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(600)"

    def ask() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        made.stop()

    asking = threading.Thread(target=ask)
    asking.start()
    assert not made.run([piece("long", code)])
    asking.join()


def test_forked_pieces_leave_a_log_and_a_status(tmp_path: Path) -> None:
    from pieces import Runner

    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys; print('process', os.getpid(), sys.argv[1:]); sys.exit(int(sys.argv[1]))"
    )
    from pieces import Piece

    pieces = [Piece(f"exit-{code}", (str(script), str(code)), {}) for code in (0, 3)]
    with pytest.raises(UserError, match="exit-3 failed"):
        Runner(tmp_path, [None], None, lambda line: None).run(pieces)
    log = (tmp_path / "logs" / "exit-0.txt").read_text()
    assert log.startswith("process ") and str(os.getpid()) not in log and "['0']" in log
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["exit-0.json"]
