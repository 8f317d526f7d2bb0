"""A run on a GPU that is cut short has shown the tracebacks of what failed before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from processes import run_command

TESTS = """
import os, pytest

@pytest.mark.gpu
def test_fails():
    assert 6 * 7 == 41

def test_fails_elsewhere():
    assert 6 * 7 == 40

def test_is_cut_short():
    os._exit(3)
"""


@pytest.mark.parametrize(
    ("workers", "code"), [([], 3), (["-n", "1", "--max-worker-restart", "0"], 1)], ids=["alone", "xdist"]
)
def test_tracebacks_come_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: list[str], code: int
) -> None:
    """Under xdist the first process outlives its worker, and repeats all tracebacks at the end."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: on a GPU\n")
    done = run_command(
        [sys.executable, "-m", "pytest", "-p", "early_failures", *workers, str(tmp_path)],
        code=code,
        cwd=tmp_path,
    )
    before_the_end = done.stdout.partition("= FAILURES =")[0]
    assert "test_it.py::test_fails (call)" in before_the_end
    assert "assert (6 * 7) == 41" in before_the_end
    assert "== 40" not in before_the_end
