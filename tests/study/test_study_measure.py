"""What the study measures of a model: the corpus it is read on, copying, and every arm from end to end."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mtraining.data import TokenShards
from mtraining.errors import UserError
from mtraining.evaluate.results import Key
from mtraining.kernel import SparseIndex, pack_blocks

CORPUS = {
    "tokenizer": "byte",
    "code": ["package:json"],
    "code_held_out": "package:email",
    "novels_held_out": ["held"],
    "parts_held_out": 3,
    "max_tokens": 3000,
}


def test_held_out_works_are_cut_into_parts_and_not_trained_on(tmp_path: Path) -> None:
    from corpus import SPARE, make

    novels = tmp_path / "novels"
    novels.mkdir()
    held = " ".join(f"unseen{number}" for number in range(200))
    (novels / "held.txt").write_text(held)
    (novels / "other.txt").write_text("a tale that is trained on " * 20)
    make(tmp_path / "study", CORPUS, 500, novels)
    unseen, tokens = (TokenShards(tmp_path / "study" / "corpus" / name) for name in ("held-out", "tokens"))
    names = [unseen.name(number) for number in range(unseen.num_documents)]
    # In turns: no work gives a second part before every work has given its first.
    assert names == ["code-0.txt", "held-0.txt", "held-1.txt"]
    assert set(unseen.lengths.tolist()) == {500 + SPARE + 1}
    assert bytes(unseen.document(1)[:-1].astype("uint8")).decode() == held[: 500 + SPARE]
    trained = b"".join(bytes(tokens.document(n)[:-1].astype("uint8")) for n in range(tokens.num_documents))
    assert b"a tale that is trained on" in trained and b"unseen" not in trained


def test_a_corpus_without_what_it_holds_out_is_refused(tmp_path: Path) -> None:
    from corpus import make

    (tmp_path / "other.txt").write_text("text")
    with pytest.raises(UserError, match=r"has no held.txt, which the plan holds out"):
        make(tmp_path / "study", CORPUS, 500, tmp_path)


def test_the_loss_of_a_copy_is_that_of_its_second_reading() -> None:
    from measure import CUE, copied

    # The loss of a token is its place in the sequence, so means say which places were taken.
    generator = SimpleNamespace(token_nll=lambda tokens: torch.arange(1, len(tokens)).float())
    record = copied(generator, list(range(1000)), gap=100, span=32)
    first, again = torch.arange(CUE, 32).float(), torch.arange(132 + CUE, 164).float()
    assert record == {"first": first.mean().item(), "again": again.mean().item(), "tokens": 32 - CUE}
    with pytest.raises(UserError, match=r"measure.copy.gaps: 1000 is more than"):
        copied(generator, list(range(1000)), gap=1000, span=32)


def study(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[2] / "recipes" / "study"), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(results: str) -> dict[tuple[str, ...], float | None]:
    """Of each line; None where it has none."""
    lines = [json.loads(line) for line in results.splitlines()]
    return {tuple(str(line[name]) for name in Key._fields): line.get("nll") for line in lines}


@pytest.mark.slow
@pytest.mark.sweep
def test_two_arms_run_on_a_cpu(tmp_path: Path) -> None:
    common = (str(tmp_path / "study"), "--smoke")
    study("prepare", *common)
    told = study("run", *common, "--arms", "dense,recommended", "--seeds", "1")
    missing = told.split("## Missing")[1]
    assert (
        "- moba-0: not trained" in missing and "dense-0: " not in missing and "recommended-0" not in missing
    )
    with open(tmp_path / "study" / "summary" / "arms.csv", newline="") as file:
        dense, recommended = csv.DictReader(file)
    assert float(dense["density"]) == 1 and 0 < float(recommended["density"]) < 0.6

    # Trained again for its tasks, dense attention ends elsewhere: what was measured of it is of other weights.
    measured = tmp_path / "study" / "measured" / "dense-0"
    before = [(measured / name).read_text() for name in ("run.json", "results.jsonl")]
    run = json.loads(before[0])
    (measured / "run.json").write_text(json.dumps(run | {"models": {"dense-0": "other weights"}}))
    (measured / "results.jsonl").write_text(before[1].replace('"nll": ', '"nll": 9'))
    assert (measured / "results.jsonl").read_text() != before[1]
    (tmp_path / "study" / "done" / "tasks-dense-0.json").unlink()
    study("run", *common, "--arms", "dense")
    assert (measured / "run.json").read_text() == before[0]
    assert losses((measured / "results.jsonl").read_text()) == losses(before[1])
    assert "all of it is measured again" in (tmp_path / "study" / "logs" / "tasks-dense-0.txt").read_text()


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.parametrize("plan", ["extend.yaml", "learn.yaml"])
def test_every_arm_runs_on_a_cpu(tmp_path: Path, plan: str) -> None:
    """The commands of docs/study.md, tiny: nothing is missing in the end, and nothing is done twice."""
    common = (str(tmp_path / "study"), "--plan", plan, "--smoke")
    study("prepare", *common)
    told = study("run", *common, "--processes", "2")
    assert told.rstrip().endswith("## Missing\n\nnothing")
    with open(tmp_path / "study" / "summary" / "arms.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    from arms import read_plan

    assert [row["arm"] for row in rows] == [arm.name for arm in read_plan(plan).arms]
    assert float(rows[0]["density"]) == 1 and 0 < float(rows[1]["density"]) < 0.6
    again = study("run", *common)
    assert "begins" not in again
    table = "answers" if plan == "learn.yaml" else "copy"
    assert (tmp_path / "study" / "summary" / f"{table}.csv").exists()


@pytest.mark.slow
def test_a_study_goes_on_on_a_bare_machine(tmp_path: Path) -> None:
    """The script for GPUs, as a machine without any runs it: what comes back has no weights, and is enough to go on."""
    first, second = tmp_path / "first", tmp_path / "second"
    study("prepare", str(first), "--smoke")
    shutil.copytree(first, second)
    told = script(first, tmp_path / "one.tgz", ARMS="dense:0")
    assert "tasks-dense-0 is done" in told
    with tarfile.open(tmp_path / "one.tgz") as archive:
        names = archive.getnames()
        assert "./measured/dense-0/results.jsonl" in names and "./runs/dense-0/metrics.jsonl" in names
        assert not any("checkpoints" in name or "corpus" in name for name in names)
    assert (tmp_path / "one.tgz").stat().st_size < 2**20
    told = script(
        second, tmp_path / "two.tgz", "--before", str(tmp_path / "one.tgz"), ARMS="dense:0,frozen:0"
    )
    assert "train-frozen-0 is done" in told and "dense-0 begins" not in told
    with open(second / "summary" / "compared.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["model"], row["against"]) for row in rows} == {
        ("frozen-0", "dense-0"),
        ("frozen-0", "frozen-0"),
        ("dense-0", "dense-0"),
    }


def script(folder: Path, results: Path, *options: str, **environment: str) -> str:
    path = Path(__file__).parents[2] / "recipes" / "study" / "two_gpus.sh"
    done = subprocess.run(
        ["bash", str(path), "extend", str(folder), "30", str(results), "--smoke", *options],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": sys.executable} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_shared_indices_by_hand() -> None:
    from measure import shared_by_layer

    def index(
        diagonals: list[int], columns: list[int], blocks: list[tuple[int, int]] | None = None
    ) -> SparseIndex:
        """One head, eight blocks of four tokens; 32 pads the columns."""
        bits, listed = torch.zeros(1, 1, 8, dtype=torch.bool), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
        bits[0, 0, diagonals] = True
        for row, column in blocks or ():
            listed[0, 0, row, column] = True
        return SparseIndex(
            32, 4, bits, torch.tensor([[columns]], dtype=torch.int32), None if blocks is None else pack_blocks(listed)
        )  # fmt: skip

    one, other = index([0, 1, 5], [0, 3, 9, 32]), index([0, 5, 6], [3, 8, 9, 11])
    # Diagonals 0 and 5 of 0, 1, 5, 6; columns 3 and 9 of 0, 3, 8, 9, 11.
    assert shared_by_layer([one], [other]) == {"columns": [0.4], "tiles": [0.5]}
    # Above the diagonal nothing is computed: (2, 6) counts in neither.
    listed = index([], [], [(3, 1), (4, 0), (2, 6)]), index([], [], [(3, 1), (5, 5), (2, 6)])
    assert shared_by_layer([listed[0]], [listed[1]]) == {"columns": [None], "tiles": [1 / 3]}


def test_what_takes_long_is_read_in_two_ways() -> None:
    from measure import ways_of_stage

    read = {"dense": 1, "sparse": 2, "own": 3}
    assert list(ways_of_stage("text", read)) == ["dense", "sparse", "own"]
    assert list(ways_of_stage("copy", read)) == list(ways_of_stage("tasks", read)) == ["dense", "own"]
    assert list(ways_of_stage("tasks", {"dense": 1, "sparse": 2})) == ["dense", "sparse"]
