"""The helper for commands: what it shows of one that fails, hangs, or outlives its test."""

from __future__ import annotations

import sys
import textwrap

import pytest

from mtraining.train.peers import children
from processes import Started, run_command, started, wait_for


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_a_failure_shows_all_that_was_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="exit code 3, not 0") as caught:
        run_command(python("import sys; print('to out'); print('to err', file=sys.stderr); sys.exit(3)"))
    told = "".join(caught.value.__notes__)
    assert "to out" in told and "to err" in told and "exit code 3" in told
    assert told in capsys.readouterr().out  # where pytest shows it, whatever fails later


def test_a_command_that_hangs_shows_the_stacks_of_its_children_too() -> None:
    hangs = """
        import subprocess, sys, time
        def waits_in_{name}():
            {first}
            print('ready', flush=True)
            time.sleep(600)
        waits_in_{name}()
    """
    child = hangs.format(name="child", first="pass")
    command = f"[sys.executable, '-c', {textwrap.dedent(child)!r}]"
    start = f"subprocess.Popen({command}, stdout=subprocess.PIPE).stdout.readline()"
    parent = hangs.format(name="parent", first=start)
    with started(python(parent)) as process:
        wait_for(lambda: "ready" in process.so_far().stdout, alive=[process])
        with pytest.raises(AssertionError, match="no end in 0 s") as caught:
            process.wait(limit=0.1)
    assert "waits_in_parent" in str(caught.value) and "waits_in_child" in str(caught.value)


def test_what_a_test_leaves_behind_is_ended_with_its_children() -> None:
    seen: list[Started] = []
    code = "import subprocess, time; subprocess.Popen(['sleep', '600']); print('ready', flush=True); time.sleep(600)"
    with started(python(code)) as process:
        seen.append(process)
        wait_for(lambda: "ready" in process.so_far().stdout, alive=[process])
        below = children(process.pid)
        assert len(below) == 1 and not below[0].gone()
    assert below[0].gone()
    assert seen[0].poll() is not None
