"""The start of a run, told and kept part by part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_data, tiny_config

from mtraining.kernel.compilations import Compilations
from mtraining.model import load
from mtraining.train import start as start_module
from mtraining.train.about import ABOUT
from mtraining.train.loop import train
from mtraining.train.peers import started_at
from mtraining.train.start import FIRST_STEP, IMPORTS, StartLog, command_began
from processes import run_command

PARTS = [
    IMPORTS, "checks", "process groups", "model", "data", "optimizer", "checkpoint", "trackers and predictions",
    FIRST_STEP,
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("text"))


def test_a_run_tells_its_start_once_and_keeps_it(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path / "run", shards, train={"steps": 2})
    train(config, began=time.time() - 1000)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("start:")]
    kept = json.loads((tmp_path / "run" / ABOUT).read_text())
    seconds = kept["start"]["seconds"]
    assert list(seconds) == PARTS
    assert 1000 <= seconds[IMPORTS] < 1100 and seconds["model"] > 0 and seconds[FIRST_STEP] > 0
    assert kept["start"]["kernels_compiled"] == kept["start"]["graphs_compiled"] == 0
    assert kept["environment"] and kept["memory_predicted"]
    assert len(told) == 1
    assert f"start: {sum(seconds.values()):.1f} s to the end of the first step (imports 10" in told[0]
    # A resumed run has a start of its own.
    train(tiny_config(tmp_path / "run", shards, train={"steps": 3}))
    assert list(json.loads((tmp_path / "run" / ABOUT).read_text())["start"]["seconds"]) == PARTS[1:]


def test_parts_are_the_time_between_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([110.0, 111.5, 114.0, 114.5, 121.0])
    monkeypatch.setattr(start_module.time, "time", lambda: next(times))
    log = StartLog(began=100.0)
    for part in ("checks", "model", "checks", FIRST_STEP):
        log.done(part)
    assert log.seconds == {IMPORTS: 10.0, "checks": 2.0, "model": 2.5, FIRST_STEP: 6.5}


def test_a_later_step_tells_what_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    log, told = StartLog(), list[str]()
    taken = iter(
        [
            Compilations(Counter(a=2), Counter(b=1), 3.0),
            Compilations(loaded=Counter(b=1)),
            Compilations(Counter(d=1, c=2), Counter(), 4.5),
            Compilations(),
        ]
    )
    monkeypatch.setattr(log, "_take", lambda: next(taken))
    first = log.step_done(1, told.append)
    assert first is not None and first["kernels_compiled"] == 2 and first["kernels_from_cache"] == 1
    assert told.pop().endswith("; 2 kernels compiled and 1 from the cache in 3.0 s")
    assert [log.step_done(step, told.append) for step in (2, 3, 4)] == [None, None, None]
    assert told == ["compiled by step 3: 3 kernels compiled and 0 from the cache in 4.5 s (c, d)"]


def test_when_a_command_began(monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    after = time.time()
    # The kernel counts in hundredths.
    assert before - 0.1 <= started_at(child.pid) <= after + 0.1
    child.communicate(b"\n")
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    own, parent = started_at(os.getpid()), started_at(os.getppid())
    assert command_began() == pytest.approx(own, abs=0.1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    assert command_began() == pytest.approx(parent, abs=0.1)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert command_began() == pytest.approx(own, abs=0.1)


OPTIONAL = (
    "datasets matplotlib mlflow wandb trackio tensorboard pandas pyarrow lm_eval mtraining.report".split()
)
OF_RANKS = "transformers torch.distributed.tensor torch._dynamo peft scipy mtraining.train.loop".split()


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        # Each would be seconds before the first rank starts, which then imports them itself.
        ("mtraining.train.config, mtraining.train.launch, mtraining.train.start", OPTIONAL + OF_RANKS),
        ("mtraining.train.loop", OPTIONAL),
    ],
    ids=["launcher", "rank"],
)
def test_nothing_is_imported_that_is_not_needed(modules: str, unwanted: list[str]) -> None:
    code = f"import sys, {modules}; print(*[name for name in {unwanted} if name in sys.modules])"
    assert run_command([sys.executable, "-c", code]).stdout.split() == []


GARBAGE = """
import gc, sys
from mtraining.errors import UserError
from mtraining.train import launch
amid = []
def look(phase, info):
    loop = sys.modules.get("mtraining.train.loop")
    amid.append(loop is not None and not hasattr(loop, "train"))
gc.callbacks.append(look)
try:
    launch._train("[]", None, None, 0.0)
except UserError:
    gc.collect()
    print(any(amid), len(amid) > 0, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


def test_a_rank_looks_for_no_garbage_amid_its_imports() -> None:
    assert run_command([sys.executable, "-c", GARBAGE]).stdout.split() == ["False", "True", "True", "True"]


def test_a_tokenizer_is_loaded_once(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = shards / "tokenizer"
    asked: list[Any] = []
    plain = load.AutoTokenizer.from_pretrained

    def loaded(source: Any, **options: Any) -> Any:
        asked.append(source)
        return plain(source, **options)

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", loaded)
    model = {"tokenizer": str(tokenizer)}
    train(tiny_config(tmp_path / "run", shards, train={"steps": 2}, model=model))
    assert asked == [str(tokenizer)]
