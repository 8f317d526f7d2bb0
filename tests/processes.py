"""Commands that tests start: what they printed is shown when a test fails, and one that hangs shows where.

`run_command([...])` waits for a command. `with started([...]) as process:` leaves it running. Both write stdout and
stderr to files, so that nobody waits for a full pipe, or for a grandchild that holds one open. Both also print them at
the end, for pytest to show when the test fails. A command past its limit gets SIGABRT, with all its children: Python's
faulthandler then writes the stack of every thread to stderr. Only processes that the test itself started are ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mtraining.train.peers import OsProcess, children

LIMIT = 400.0  # far more than any command takes, also on a busy machine; below the limit of a whole test
DUMP_SECONDS = 5.0


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    command: list[str]
    returncode: int | None
    stdout: str
    stderr: str

    def __str__(self) -> str:
        return (
            f"$ {' '.join(self.command)}\nexit code {self.returncode}\n"
            f"--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}\n---"
        )


class Started:
    """A command that may still run."""

    def __init__(self, command: Sequence[Any], env: dict[str, str] | None, cwd: Path | None) -> None:
        self.command = [str(word) for word in command]
        self._out: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._err: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            self.command,
            env={**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
        )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send a signal to the command, not to its children."""
        self._process.send_signal(number)

    def so_far(self) -> Done:
        """What it has printed."""
        texts = []
        for file in (self._out, self._err):
            file.flush()
            texts.append(Path(f"/proc/self/fd/{file.fileno()}").read_text(encoding="utf-8", errors="replace"))
        return Done(self.command, self.poll(), *texts)

    def wait(self, limit: float = LIMIT) -> Done:
        """Wait for its end; past the limit AssertionError, with the stacks of the command and its children."""
        try:
            self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.end(signal.SIGABRT)
            raise AssertionError(
                f"no end in {limit:.0f} s; the stacks stand in stderr\n{self.so_far()}"
            ) from None
        return self.so_far()

    def end(self, *signals: int) -> None:
        """Send it and its descendants each of `signals`, with some seconds to act, then SIGKILL."""
        family = [*self.descendants(), OsProcess(self.pid, 0)] if self.poll() is None else []
        for number in (*signals, signal.SIGKILL):
            for process in family:
                with contextlib.suppress(ProcessLookupError):
                    if process.pid == self.pid:
                        self._process.send_signal(number)
                    elif not process.gone():
                        os.kill(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(DUMP_SECONDS)
        self._process.wait()

    def descendants(self) -> list[OsProcess]:
        """Its children and theirs, oldest first."""
        found, new = [], children(self.pid)
        while new:
            found += new
            new = [child for process in new for child in children(process.pid)]
        return found

    def close(self) -> None:
        """Give the files back."""
        self._out.close()
        self._err.close()


@contextmanager
def started(
    command: Sequence[Any], *, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Iterator[Started]:
    """A running command. It is ended, with its children, on the way out; an error inside gets its output as a note."""
    process = Started(command, env, cwd)
    try:
        yield process
    except BaseException as error:
        process.end()
        error.add_note(str(process.so_far()))
        raise
    finally:
        process.end()
        print(process.so_far())
        process.close()


def run_command(
    command: Sequence[Any],
    *,
    code: int | None = 0,
    limit: float = LIMIT,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> Done:
    """Run a command to its end and insist on its exit code (None: any)."""
    with started(command, env=env, cwd=cwd) as process:
        done = process.wait(limit)
        assert code is None or done.returncode == code, f"exit code {done.returncode}, not {code}"
    return done


def wait_for(condition: Any, limit: float = LIMIT, *, alive: Sequence[Started] = ()) -> None:
    """Poll until `condition()` is true; AssertionError past the limit, or when a command in `alive` has ended."""
    deadline = time.monotonic() + limit
    while not condition():
        for process in alive:
            assert process.poll() is None, f"it ended too early\n{process.so_far()}"
        assert time.monotonic() < deadline, f"not in {limit:.0f} s"
        time.sleep(0.02)
