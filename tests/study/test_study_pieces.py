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
    return Runner(tmp_path, ["0"] * places, minutes, told.append, fresh=True), told


def piece(name: str, code: str, after: tuple[str, ...] = (), **settings: Any) -> Any:
    from pieces import Piece

    return Piece(name, ("-c", code), settings, after)


def leaving(name: str, folder: Path, count: Path) -> Any:
    """A piece that leaves a folder, and counts how often it was done."""
    from pieces import Piece

    code = f"import os; os.makedirs({str(folder)!r}, exist_ok=True); open({str(count)!r}, 'a').write('x')"
    return Piece(name, ("-c", code), {}, leaves=folder)


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


def test_a_fork_that_cannot_use_its_gpu_begins_a_new_interpreter(tmp_path: Path) -> None:
    from pieces import Piece, Runner

    script = tmp_path / "script.py"
    script.write_text("import os, sys; print('on', os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(75)")
    # No machine has this GPU, so that CUDA cannot begin.
    assert not Runner(tmp_path, ["99"], None, lambda line: None).run([Piece("one", (str(script),), {})])
    log = (tmp_path / "logs" / "one.txt").read_text()
    assert log.splitlines() == ["the fork cannot use its GPU; a new interpreter begins", "on 99"]


def test_training_whose_weights_are_gone_is_done_again_where_they_are_needed(tmp_path: Path) -> None:
    from pieces import Piece

    weights, count = tmp_path / "weights", tmp_path / "count"
    train = leaving("train", weights, count)
    bad = piece("measure", "import sys; sys.exit(2)", after=("train",))
    with pytest.raises(UserError):
        runner(tmp_path)[0].run([train, bad])
    # The weights are there: measuring is tried again, training is not.
    with pytest.raises(UserError):
        runner(tmp_path)[0].run([train, bad])
    assert count.read_text() == "x"
    weights.rmdir()
    good = piece("measure", "pass", after=("train",))
    made, told = runner(tmp_path)
    assert made.run([train, good])
    assert count.read_text() == "xx" and any("train is done again" in line for line in told)
    # Everything is measured, so weights are needed no more; what could be measured besides is left out.
    weights.rmdir()
    slow = Piece("tasks", ("-c", "pass"), {}, after=("train",), again=False)
    made, told = runner(tmp_path)
    assert made.run([train, good, slow])
    assert count.read_text() == "xx" and any("tasks is left out" in line for line in told)
    assert not (tmp_path / "done" / "tasks.json").exists()


def test_an_arm_begins_only_where_there_is_time_for_it(tmp_path: Path) -> None:
    from pieces import Piece

    long = Piece("long", ("-c", "pass"), {}, seconds=7200)
    made, _ = runner(tmp_path, minutes=60)
    assert not made.run([long, piece("short", "pass"), piece("after", "pass", after=("long",))])
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["short.json"]


def test_results_are_kept_after_each_piece(tmp_path: Path) -> None:
    from pieces import Runner

    seen: list[list[str]] = []

    def keep() -> None:
        seen.append(sorted(path.stem for path in (tmp_path / "done").glob("*.json")))

    pieces = [piece("one", "pass"), piece("bad", "raise SystemExit(3)"), piece("two", "pass")]
    with pytest.raises(UserError):
        Runner(tmp_path, ["0"], None, lambda line: None, ended=keep, fresh=True).run(pieces)
    assert seen == [["one"], ["one"], ["one", "two"]]


def test_one_killed_piece_leaves_the_others(tmp_path: Path) -> None:
    killed = piece("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(UserError, match=r"killed failed \(exit status -9\)"):
        runner(tmp_path, places=2)[0].run([killed, piece("good", "pass")])
    assert [path.name for path in (tmp_path / "done").iterdir()] == ["good.json"]


def test_quick_measurements_of_all_come_before_slow_ones(tmp_path: Path) -> None:
    from arms import read_plan
    from pieces import pieces_of

    plan = read_plan("extend.yaml", "smoke").chosen(["dense", "moba"], None)
    found = pieces_of(plan, tmp_path, seconds=100)
    names = [piece.name for piece in found]
    assert names == [
        "train-dense-0",
        "measure-dense-0",
        "train-moba-0",
        "measure-moba-0",
        "tasks-dense-0",
        "tasks-moba-0",
    ]
    whole = [piece.name for piece in pieces_of(read_plan("extend.yaml").chosen(["dense:0"]), tmp_path)]
    assert whole == ["train-dense-0", "measure-dense-0", "tasks-dense-0", "measure-base", "tasks-base"]
    by_name = {piece.name: piece for piece in found}
    assert by_name["tasks-moba-0"].after == ("train-moba-0", "measure-moba-0")
    assert by_name["measure-moba-0"].command[2:4] == ("text,copy", "moba-0")
    assert by_name["train-moba-0"].seconds == 100
    assert by_name["train-moba-0"].leaves == tmp_path / "runs" / "moba-0" / "checkpoints"
    # Where weights are gone, tasks alone are no reason to train again, unless asked for.
    assert [piece.name for piece in found if not piece.again] == ["tasks-dense-0", "tasks-moba-0"]
    assert all(piece.again for piece in pieces_of(plan, tmp_path, tasks_again=True))


def test_bad_commands_are_one_sentence(
    study_main: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        assert study_main.main(list(words)) == 2
        return capsys.readouterr().err

    smoke = ("--smoke", "--set", "config.train.steps=3")
    assert "has no corpus; run the command prepare first" in told("run", str(tmp_path), *smoke)
    assert "--small: " in told("run", str(tmp_path), "--small")
    assert "'steps=3' is no part of extend.yaml" in told("prepare", str(tmp_path), "--set", "steps=3")
    assert "has no plan.yaml, so nothing was run there" in told("summary", str(tmp_path))
    assert "has no plan.yaml" in told("publish", str(tmp_path), "name")
    assert "no.tgz cannot be unpacked" in told("publish", str(tmp_path), "name", str(tmp_path / "no.tgz"))
