"""A run that is killed or stopped at an evaluation goes on to the same values: none is lost, and none made twice."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import differing, evaluated, raw_config, run_job

import mtraining.train.loop as loop
from distributed import ProcessPool
from mtraining.errors import SAVED, RunStopped
from mtraining.train.config import parse_config
from mtraining.train.evaluation import Evaluation
from mtraining.train.metrics import read_metrics
from mtraining.train.store import CheckpointStore, step_of


def trained(records: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    return [(one["step"], one["loss"], one["grad_norm"]) for one in records if "loss" in one]


# -- kills and stops ---------------------------------------------------------------------------------------------------

EVALUATE: dict[str, Any] = {"every": 2, "max_sequences": 2, "keep_best": True}


def run_config(folder: Path, shards: Path, unseen: Path) -> dict[str, Any]:
    return raw_config(
        folder, shards, checkpoint={"every": 3, "keep_last": 9}, train={"steps": 5, "batch_size": 2},
        evaluate={**EVALUATE, "data": str(unseen)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, shards: Path, unseen: Path) -> Path:
    """A run of five steps that nothing stopped: evaluated at 0, 2, 4 and 5, saved at 2, 3, 4 and 5."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    loop.train(parse_config(run_config(folder, shards, unseen)))
    return folder


def test_evaluations_come_at_the_start_every_k_and_at_the_end(whole: Path) -> None:
    records = read_metrics(whole)
    assert [(one["step"], "evaluation" in one) for one in records] == [
        (0, True), (1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (5, False), (5, True),
    ]  # fmt: skip
    losses = [one["held_out_loss"] for one in records if "evaluation" in one]
    assert losses == sorted(losses, reverse=True)  # so every one was the best so far, and was saved
    assert [path.name[-1] for path in CheckpointStore(whole).complete()] == ["2", "3", "4", "5"]
    assert (whole / "best").resolve() == CheckpointStore(whole).path(5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "at, amid",
    [
        (2, True),
        (5, False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, True), (2, False), (4, True))),
        *(
            pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.sweep])
            for case in ((0, False), (4, False), (5, True))
        ),
    ],
)
def test_a_run_killed_at_an_evaluation_goes_on_to_the_same_values(
    tmp_path: Path,
    shards: Path,
    unseen: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    amid: bool,
) -> None:
    """Killed while it reads held-out text, or when that is done and nothing of it is written yet."""
    run = Evaluation.run

    def killed(self: Evaluation, step: int, stopped: Any, progress: Any) -> Any:
        def dies(text: str) -> None:
            if step == at and amid:
                raise Killed

        record = run(self, step, stopped, dies)
        if step == at:
            raise Killed
        return record

    monkeypatch.setattr(Evaluation, "run", killed)
    raw = run_config(tmp_path / "run", shards, unseen)
    with pytest.raises(Killed):
        loop.train(parse_config(raw))
    monkeypatch.setattr(Evaluation, "run", run)
    loop.train(parse_config(raw))
    same_run(tmp_path / "run", whole, tmp_path)


@pytest.mark.parametrize(
    "lines, saved", [pytest.param(3, 0, marks=pytest.mark.slow), (4, 2), (5, 2), (7, 4), (9, 5)]
)
def test_a_record_cut_short_is_made_again(
    tmp_path: Path, shards: Path, unseen: Path, whole: Path, lines: int, saved: int
) -> None:
    """Killed amid the writing of a line, with these many steps saved.

    Lines are those of step 2, of its evaluation, of step 3, of the evaluation after step 4, and of the last one.
    At step 3 the evaluation of the saved step is there already.
    """
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    kept = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:lines]
    (folder / "metrics.jsonl").write_text("".join(kept[:-1]) + kept[-1][:30], encoding="utf-8")
    for path in CheckpointStore(folder).complete():
        if step_of(path) > saved:
            shutil.rmtree(path)
    loop.train(parse_config(run_config(folder, shards, unseen)))
    same_run(folder, whole, tmp_path)


def same_run(folder: Path, whole: Path, scratch: Path) -> None:
    found, expected = read_metrics(folder), read_metrics(whole)
    assert [(one["step"], "evaluation" in one) for one in found] == [
        (one["step"], "evaluation" in one) for one in expected
    ]
    assert evaluated(found) == evaluated(expected)
    assert trained(found) == trained(expected)
    assert differing(CheckpointStore(folder).path(5), CheckpointStore(whole).path(5), scratch) == []
    assert (folder / "best").resolve() == CheckpointStore(folder).path(5)


@pytest.mark.parametrize(
    "at", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_stop_that_comes_amid_an_evaluation_saves_first(
    tmp_path: Path, shards: Path, unseen: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The step is saved and the evaluation given up; it comes first when the run goes on."""
    raw = run_config(tmp_path / "run", shards, unseen)
    raw["evaluate"]["every"] = at  # of steps that are saved anyway, and that are not
    if at == 3:
        raw["evaluate"]["keep_best"] = False
    straight = {**raw, "output": str(tmp_path / "straight")}
    loop.train(parse_config(straight))
    run = Evaluation.run

    def asked(self: Evaluation, step: int, stopped: Any, progress: Any) -> Any:
        return run(self, step, (lambda: True) if step == at else stopped, progress)

    monkeypatch.setattr(Evaluation, "run", asked)
    with pytest.raises(
        RunStopped, match=f"stopped by a signal after .*step,? {at}, saved in .*step_0000000{at}"
    ) as stop:
        loop.train(parse_config(raw))
    assert stop.value.code == SAVED
    assert [one["step"] for one in evaluated(read_metrics(tmp_path / "run"))] == [0]
    monkeypatch.setattr(Evaluation, "run", run)
    loop.train(parse_config(raw))
    found, expected = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "straight")
    assert evaluated(found) == evaluated(expected)
    assert trained(found) == trained(expected)


KILLED = """
import os, signal, sys

from mtraining.train.config import load_config
from mtraining.train.evaluation import Evaluation
from mtraining.train.launch import launch


def kill_amid_the_evaluation_of_step_2():
    run = Evaluation.run

    def killed(self, step, stopped, progress):
        def dies(text):
            if step == 2 and os.environ["RANK"] == "1" and "sequence 2" in text:
                os.kill(os.getpid(), signal.SIGKILL)

        return run(self, step, stopped, dies)

    Evaluation.run = killed


if __name__ == "__main__":
    launch(load_config(sys.argv[1]), 2, before=kill_amid_the_evaluation_of_step_2)
"""


@pytest.mark.slow
def test_a_rank_killed_amid_an_evaluation(
    tmp_path: Path, shards: Path, unseen: Path, pool: ProcessPool
) -> None:
    """SIGKILL to one of two launched processes; the checkpoint of the step is there, and the run goes on from it."""
    raw = run_config(tmp_path / "run", shards, unseen)
    raw |= {"parallel": {"cp": 2}}
    raw["checkpoint"] |= {"every": 2, "async": False}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "killed.py", "recipe.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "rank 1 was killed by SIGKILL" in ended.stderr, ended.stderr
    killed = read_metrics(tmp_path / "run")
    assert [(one["step"], "evaluation" in one) for one in killed] == [(0, True), (1, False), (2, False)]
    assert [step_of(path) for path in CheckpointStore(tmp_path / "run").complete()] == [2]
    found = pool.run(run_job, world=2, raw=raw)[0]
    straight = pool.run(run_job, world=2, raw=raw | {"output": str(tmp_path / "straight")})[0]
    assert evaluated(found) == evaluated(straight) and trained(found) == trained(straight)
    assert [one["step"] for one in evaluated(found)] == [0, 2, 4, 5]
