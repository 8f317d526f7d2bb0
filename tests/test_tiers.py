"""What the Makefile runs: the core of every room, under names that all workers share, groups in one of them."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from processes import run_command

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ROOMS = sorted(path.parent.name for path in (ROOT / "src" / "mtraining").glob("*/__init__.py"))


def chosen_by(target: str) -> Counter[str]:
    """How many tests a target of the Makefile runs, by the folder of tests that they lie in."""
    chosen = re.search(rf'^{target}:.*\n\t\$\(PYTEST\) -m "([^"]+)"', MAKEFILE, flags=re.MULTILINE)
    assert chosen, f"the Makefile has no target {target} with a choice of tests"
    listed = run_command(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", chosen[1]],
        cwd=ROOT,
    )
    return Counter(re.findall(r"^tests/(\w+)/.*::", listed.stdout, flags=re.MULTILINE))


@pytest.mark.slow
@pytest.mark.sweep
def test_every_room_has_tests_that_are_not_slow() -> None:
    fast = chosen_by("test")
    assert len(ROOMS) > 10
    assert [room for room in ROOMS if fast[room] < 3] == []


@pytest.mark.slow
@pytest.mark.sweep
def test_names_of_tests_are_the_same_in_every_process() -> None:
    """pytest-xdist refuses to run where they differ, as the order of a set does from process to process."""
    names = {
        re.sub(
            r"collected in .*",
            "",
            run_command(
                [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
                env={**os.environ, "PYTHONHASHSEED": seed},
                cwd=ROOT,
            ).stdout,
        )
        for seed in ("1", "2")
    }
    assert len(names) == 1


@pytest.mark.slow
def test_groups_of_tests_stay_in_one_worker(tmp_path: Path) -> None:
    """A newer pytest took no notice of them, and each worker made what is dear to make."""
    (tmp_path / "test_group.py").write_text(
        "import os, pathlib, time, pytest\n"
        "@pytest.mark.xdist_group('one')\n"
        "@pytest.mark.parametrize('number', range(8))\n"
        "def test_worker(number):\n"
        "    time.sleep(0.1)\n"
        "    pathlib.Path(f'{number}.txt').write_text(os.environ['PYTEST_XDIST_WORKER'])\n",
        encoding="utf-8",
    )
    run_command([sys.executable, "-m", "pytest", "-n", "2", "--dist=loadgroup"], cwd=tmp_path)
    workers = [file.read_text(encoding="utf-8") for file in tmp_path.glob("?.txt")]
    assert len(workers) == 8 and len(set(workers)) == 1
