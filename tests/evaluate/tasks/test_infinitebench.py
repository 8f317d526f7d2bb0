"""InfiniteBench: generated tasks whose answers are computed again here, and tasks on published rows."""

from __future__ import annotations

import ast
import json
import re
import statistics
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mtraining.errors import UserError
from mtraining.evaluate.tasks import SampleMaker, Sources, Task, build_tasks


def tasks(folder: Path | None = None) -> dict[str, Task]:
    return {task.name: task for task in build_tasks(["infinitebench"], sources=Sources(infinitebench=folder))}


def test_there_are_twelve() -> None:
    assert len(tasks()) == 12 and sum(task.fixed for task in tasks().values()) == 6


@pytest.mark.parametrize("name, digits", [("passkey", 5), ("number_string", 10)])
def test_passkeys(name: str, digits: int) -> None:
    for number in (0, 29, 58):
        found = tasks()[name].draft(58, Random(number), number)
        (key,) = found.references
        assert re.fullmatch(rf"[1-9]\d{{{digits - 1}}}", key)
        lines = found.prompt.split("\n\n")[1].split("\n")
        assert len(lines) == 59 and key in lines[number] and found.prompt.count(key) == 2
        assert found.details["depth"] == pytest.approx(number / 58, abs=1e-4)
        if name == "number_string":  # five digits, five of them written again beside themselves
            runs = [len(run[0]) for run in re.finditer(r"(\d)\1*", key)]
            assert sum(runs) - len(runs) >= 5


def test_pairs() -> None:
    for number in (0, 3, 50):
        found = tasks()["kv_retrieval"].draft(100, Random(1), number)
        pairs = json.loads(found.prompt.split("\n\n")[1])
        key = json.loads(found.prompt.rsplit("Key: ", 1)[1])
        assert len(pairs) == 100 and pairs[key] == found.references[0]
        assert list(pairs).index(key) == number * 7 % 100


def test_order_statistics() -> None:
    seen = set()
    for number in range(21):
        found = tasks()["math_find"].draft(200, Random(number), number)
        values = json.loads(found.prompt.split("\n\n")[1])
        distinct, wanted = sorted(set(values)), found.details["question"]
        expected = {
            "largest": distinct[-1], "second largest": distinct[-2], "third largest": distinct[-3],
            "smallest": distinct[0], "second smallest": distinct[1], "third smallest": distinct[2],
            "median": statistics.median(values),
        }[wanted]  # fmt: skip
        assert float(found.references[0]) == expected and wanted in found.cue
        assert min(values) >= 0 and max(values) <= 99
        seen.add(wanted)
    assert len(seen) == 7


def test_running_values() -> None:
    found = tasks()["math_calc"].draft(500, Random(3), 0)
    terms = found.prompt.split("\n\n")[1].replace("+ ", "+").replace("- ", "-").split(" ")
    assert len(terms) == 500
    assert tuple(map(str, accumulate(map(int, terms)))) == found.references
    assert all(0 <= int(value) <= 99 for value in found.references)


def test_the_answer_to_a_calculation_grows_with_its_length() -> None:
    task = tasks()["math_calc"]
    assert task.answer_tokens(131_072) == 30_000 and task.answer_tokens(32_768) == 7_500
    assert tasks()["passkey"].answer_tokens(32_768) == 6


def test_code_that_runs() -> None:
    for number in range(10):
        found = tasks()["code_run"].draft(30, Random(number), number)
        code = found.prompt.split("work out a call.\n\n")[1].split("\n\nWhat does ")[0]
        call = re.search(r"What does (\w+\(-?\d+\)) return", found.prompt)
        assert call is not None and len(ast.parse(code).body) == 30
        space: dict[str, Any] = {}
        exec(code, space)
        assert str(eval(call[1], space)) == found.references[0]
        assert found.details["layers"] == (2, 4, 6, 8, 10)[number % 5]


ROWS = {
    "longbook_sum_eng": {"context": "A book.", "input": "", "answer": ["Short."]},
    "longbook_qa_eng": {"context": "A book.", "input": "Who?", "answer": ["Ann", "Anna"]},
    "longbook_choice_eng": {
        "context": "A book.", "input": "Who?", "answer": ["Bob"], "options": ["Ann", "Bob", "C", "D"],
    },
    "longdialogue_qa_eng": {"context": "$$MASK$$: hi", "input": "", "answer": ["ANN"]},
    "longbook_qa_chn": {"context": "一本书。", "input": "谁？", "answer": ["安"]},
    "code_debug": {"context": "def f(): pass", "input": "", "answer": "g", "options": ["f", "g", "h", "i"]},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_published_rows(name: str, tmp_path: Path, maker: SampleMaker) -> None:
    (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": 7} | ROWS[name]) + "\n", encoding="utf-8")
    task = tasks(tmp_path)[name]
    assert task.samples == 1
    sample = maker.make(task, 2048, 0)
    assert ROWS[name]["context"] in sample.draft.prompt and str(ROWS[name]["input"]) in sample.draft.prompt
    right = "B" if "options" in ROWS[name] else ROWS[name]["answer"][0]
    assert task.score(f" {right}", sample.draft.references) == 1.0
    assert task.score("quite wrong", sample.draft.references) == 0.0


def test_absent_documents_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task code_debug .*code_debug\.jsonl .*--infinitebench FOLDER"):
        tasks()["code_debug"].draft(0, Random(0), 0)
    (tmp_path / "code_debug.jsonl").write_text('{"context": "x"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"row 1 of code_debug\.jsonl in .* is not as published"):
        tasks(tmp_path)["code_debug"].draft(0, Random(0), 0)
    with pytest.raises(UserError, match="--tasks 'codedebug' is not a task of infinitebench"):
        build_tasks(["infinitebench"], ["codedebug"])
