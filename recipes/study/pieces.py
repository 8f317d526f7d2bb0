"""Runs the pieces of a study on the GPUs of this machine, within a given time.

A piece is one process on one GPU: a training run, or measurements of a trained model. A piece that is done leaves a
marker and is not done again. One that time runs out for saves what it has; the same command goes on from there.

Weights may stay behind on a machine that is given back, while tables travel. A training run whose weights are gone, and
are still needed, is therefore done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import Plan, merged, run_folder

from mtraining.errors import SAVED, UserError
from mtraining.inputs.yaml_text import write_yaml

GRACE = 60  # seconds in which a piece that is asked to stop may save what it has
LEAST = 20  # seconds: no piece begins when less is left
# Stages of the measurements of a model. The quick ones of every model come first.
QUICK, SLOW = ("text", "copy"), ("tasks",)


@dataclass(frozen=True)
class Piece:
    """One process.

    Attributes:
        name: such as train-dense-0; of its log and its marker.
        command: arguments of the Python interpreter.
        settings: what it depends on; a marker of other settings is refused.
        after: pieces that must be done before it begins.
        seconds: it does not begin when less time is left.
        leaves: a folder that pieces after it read; where that is gone, the piece counts as not done.
        again: what the piece needs is done again for it; else it is left out where that is gone.
    """

    name: str
    command: tuple[str, ...]
    settings: Mapping[str, Any]
    after: tuple[str, ...] = ()
    seconds: float = LEAST
    leaves: Path | None = None
    again: bool = True


def pieces_of(
    plan: Plan, study: Path, measured: bool = True, seconds: float = LEAST, tasks_again: bool = False
) -> list[Piece]:
    """Every piece of a plan, in the order in which free GPUs take those that can begin. Writes their configurations.

    Args:
        measured: measure models after their training.
        seconds: that training and the quick measurements of one arm need: with less time left none begins.
        tasks_again: train again a model whose weights are gone and whose tasks alone are missing.
    """
    found, slow = [], []
    for arm, seed in plan.runs():
        name, config = f"{arm.name}-{seed}", plan.run_config(arm, seed, study)
        path = study / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(write_yaml(config), encoding="utf-8")
        settings = {"config": merged(plan.config, arm.changes), "seed": seed}
        folder = run_folder(study, arm.name, seed)
        train = Piece(
            f"train-{name}",
            ("-m", "mtraining.cli", "train", str(path)),
            settings,
            seconds=seconds,
            leaves=folder / "checkpoints",
        )
        found.append(train)
        if measured:
            quick, *more = _measurements(plan, study, name, (str(folder),), tasks_again, train.name)
            found.append(quick)
            slow += more
    base = []
    if measured and plan.measure.get("base"):
        rope = plan.config["model"].get("rope", {})
        # What is known of it matters least.
        base = _measurements(
            plan, study, "base", (plan.config["model"]["init"], json.dumps(rope)), tasks_again
        )
    wanted = {"seq_len": plan.config["train"]["seq_len"], **plan.measure}
    if plan.measure.get("answers"):
        wanted["answers"] = {name: plan.corpus[name] for name in ("keys", "values")}
    (study / "measure.yaml").write_text(write_yaml(wanted), encoding="utf-8")
    return found + slow + base


def _measurements(
    plan: Plan, study: Path, name: str, model: tuple[str, ...], tasks_again: bool, *after: str
) -> list[Piece]:
    """What is measured of one model: the quick stages, and the slow ones where the plan has any."""
    script = str(Path(__file__).parent / "measure.py")
    # The second does what is left of both: a run that is trained again may end elsewhere, and is measured anew.
    stages = [QUICK, *([QUICK + SLOW] if plan.measure.get("tasks") else [])]
    names = [f"measure-{name}", f"tasks-{name}"]
    pieces = []
    for title, stage in zip(names, stages, strict=False):
        command = (script, str(study), ",".join(stage), name, *model)
        pieces.append(Piece(title, command, plan.measure, after, again=stage == QUICK or tasks_again))
        # Both write to one folder, so the second waits for the first.
        after = (*after, title)
    return pieces


class Runner:
    """Runs pieces, at most one a place at a time.

    Args:
        study: the folder.
        places: of each process that may run at one time, its CUDA_VISIBLE_DEVICES; None for a CPU.
        minutes: after this time nothing begins, and what runs is asked to save and stop; None for no limit.
        tell: prints a line.
        ended: called after each piece, whatever became of it.
        fresh: begin a new interpreter for each piece, in place of a fork that has the libraries loaded.
        grace: seconds in which what is asked to stop may save.
    """

    def __init__(
        self,
        study: Path,
        places: Sequence[str | None],
        minutes: float | None,
        tell: Callable[[str], None],
        ended: Callable[[], None] = lambda: None,
        fresh: bool = False,
        grace: float = GRACE,
    ) -> None:
        self._study, self._places, self._tell = study, places, tell
        self._after_each, self._fresh, self._grace = ended, fresh, grace
        self._start = time.monotonic()
        self._end = None if minutes is None else self._start + 60 * minutes
        self._lock = threading.Condition()
        self._waiting: list[Piece] = []
        self._running: set[str] = set()
        self._done: set[str] = set()
        self._unfinished: list[str] = []
        self._left_out: list[str] = []
        self._failed: dict[str, str] = {}

    def run(self, pieces: Sequence[Piece]) -> bool:
        """Run them all, or as many as time allows.

        Returns:
            True when all are done, False when time ran out.

        Raises:
            UserError: pieces that failed, when the others have ended; or a piece that was done under other settings.
        """
        self._sort_out(pieces)
        threads = [threading.Thread(target=self._work, args=(place,)) for place in self._places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failed:
            raise UserError(
                "; ".join(f"{name} failed ({told})" for name, told in self._failed.items())
                + f"; its log is in {self._study / 'logs'}, and the same command tries it again."
            )
        return not self._waiting and not self._unfinished

    def _sort_out(self, pieces: Sequence[Piece]) -> None:
        """Which pieces are done, and which wait."""
        done = {piece.name for piece in pieces if self._is_done(piece)}
        for piece in pieces:
            if piece.name in done and piece.leaves is not None and not piece.leaves.is_dir():
                waiting = [other for other in pieces if piece.name in other.after and other.name not in done]
                if any(other.again for other in waiting):
                    self._say(f"{piece.name} is done again: what it left is gone, and is still needed")
                    done.discard(piece.name)
                    continue
                for other in waiting:
                    self._say(f"{other.name} is left out: what {piece.name} left is gone")
                    self._left_out.append(other.name)
        self._done |= done
        self._waiting += [piece for piece in pieces if piece.name not in {*done, *self._left_out}]

    def stop(self) -> None:
        """Begin nothing more, and ask what runs to save and stop."""
        self._end = time.monotonic()

    def _work(self, place: str | None) -> None:
        while True:
            with self._lock:
                piece = self._next()
                while piece is None and self._running and self._left() > LEAST:
                    self._lock.wait(timeout=1)
                    piece = self._next()
                if piece is None:
                    return
                self._waiting.remove(piece)
                self._running.add(piece.name)
            code, seconds = self._process(piece, place)
            with self._lock:
                self._running.discard(piece.name)
                self._ended(piece, code, seconds)
                self._lock.notify_all()
                self._after_each()

    def _next(self) -> Piece | None:
        left = self._left()
        return next(
            (
                piece
                for piece in self._waiting
                if self._done.issuperset(piece.after) and left > max(LEAST, piece.seconds)
            ),
            None,
        )

    def _left(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()

    def _process(self, piece: Piece, place: str | None) -> tuple[int, float]:
        """Exit status and seconds of a piece; it is asked to stop when time is over."""
        log = self._study / "logs" / f"{piece.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        self._say(f"{piece.name} begins{'' if place is None else f' on GPU {place}'}")
        kind = _Started if self._fresh else _Forked
        process = kind(piece.command, log, place)
        # Looked at every second, for a request to stop may come at any time.
        while process.code() is None and self._left() > 0:
            process.wait(min(1.0, max(self._left(), 0.0)))
        if process.code() is None:
            process.ask_to_stop()
            process.wait(self._grace)
            if process.code() is None:
                process.kill()
            # Whatever it says of its end, it was not given the time to finish.
            return (0 if process.code() == 0 else SAVED), time.monotonic() - began
        return process.code() or 0, time.monotonic() - began

    def _ended(self, piece: Piece, code: int, seconds: float) -> None:
        if code == 0:
            self._done.add(piece.name)
            self._mark(piece, seconds)
            self._say(f"{piece.name} is done after {seconds:.0f} s")
        elif code == SAVED:
            self._unfinished.append(piece.name)
            self._say(f"{piece.name} stopped after {seconds:.0f} s, saved")
        else:
            log = (self._study / "logs" / f"{piece.name}.txt").read_text(encoding="utf-8", errors="replace")
            lines = [line for line in log.splitlines() if line.strip()]
            self._failed[piece.name] = lines[-1][:300] if lines else f"exit status {code}"
            self._say(f"{piece.name} FAILED after {seconds:.0f} s: {self._failed[piece.name]}")

    def _say(self, line: str) -> None:
        self._tell(f"{time.monotonic() - self._start:6.0f} s  {line}")

    def _marker(self, piece: Piece) -> Path:
        return self._study / "done" / f"{piece.name}.json"

    def _mark(self, piece: Piece, seconds: float) -> None:
        path = self._marker(piece)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": digest(piece.settings), "seconds": round(seconds, 1)}))

    def _is_done(self, piece: Piece) -> bool:
        path = self._marker(piece)
        if not path.exists():
            return False
        if json.loads(path.read_text())["settings"] != digest(piece.settings):
            raise UserError(
                f"{self._study} has {piece.name} of another plan; give another folder, or remove {path} and what it "
                "is of."
            )
        return True


class _Started:
    """A Python process of its own."""

    def __init__(self, command: Sequence[str], log: Path, place: str | None) -> None:
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | _own(place),
            )

    def code(self) -> int | None:
        return self._process.poll()

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def ask_to_stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class _Forked:
    """The same, forked from a process that has the libraries loaded: loading takes longer than many a piece."""

    def __init__(self, command: Sequence[str], log: Path, place: str | None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["mtraining.train.loop", "mtraining.evaluate.runner", "mtraining.cli.train"]
        )
        # Asking the driver whether there is a GPU would forbid the fork to use one; asking NVML does not.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        self._process = context.Process(target=_run, args=(tuple(command), log, place))
        self._process.start()

    def code(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> None:
        self._process.join(seconds)

    def ask_to_stop(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _own(place: str | None) -> dict[str, str]:
    """The environment that a piece has for itself."""
    gpu = {} if place is None else {"CUDA_VISIBLE_DEVICES": place}
    return {"PYTHONUNBUFFERED": "1"} | gpu


def _run(command: Sequence[str], log: Path, place: str | None) -> None:
    """In the forked process: what ``python *command`` would do."""
    with open(log, "ab", buffering=0) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    # A piece that is killed leaves what it said.
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ |= _own(place)
    if place is not None and not _sees_one_gpu():
        print("the fork cannot use its GPU; a new interpreter begins", flush=True)
        os.execv(sys.executable, [sys.executable, *command])
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


def _sees_one_gpu() -> bool:
    """Whether CUDA works here, with the one GPU that the environment names: a library may have asked for it before."""
    import torch

    try:
        torch.cuda.init()
        return torch.cuda.device_count() == 1
    except (RuntimeError, AssertionError):
        return False


def digest(settings: Mapping[str, Any]) -> str:
    """Tells settings apart."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
