"""An evaluation's lines: which samples, written when they end, gone on with after a kill, and what they amount to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mtraining.errors import UserError
from mtraining.evaluate.heatmap import draw_needles, needle_grids
from mtraining.evaluate.results import Key, Results, model_fingerprint
from mtraining.evaluate.runner import Document, Plan, evaluate, read_documents, summary
from mtraining.evaluate.summary import summarise, table, weighted
from mtraining.evaluate.tasks import Draft, Task
from mtraining.evaluate.tasks.fit import Sample


def word(name: str = "word", **options: Any) -> Task:
    return Task(
        name, "ruler", 4, lambda found, wanted: float(found == wanted[0]),
        lambda size, rng, number: Draft("", "", (f"{number}",)), **options,
    )  # fmt: skip


class Maker:
    """Samples whose only token is their number."""

    def make(self, task: Task, length: int, number: int) -> Sample:
        return Sample(task, length, number, [number], task.new_tokens, 0, task.make(1, None, number, length))  # type: ignore[arg-type]


class Parrot:
    """Answers every prompt with its token; may end in the middle, as a kill would."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.left = dies_after

    def generate(self, prompts: Sequence[list[int]], limits: Sequence[int], **options: Any) -> list[Any]:
        if self.left is not None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        self.asked += prompts
        return [
            SimpleNamespace(
                text=str(prompt[0] if prompt[0] % 2 == 0 else -1), tokens=[1], prompt_tokens=len(prompt),
                finish_reason="eos", prefill_seconds=0.1, decode_seconds=0.1, density=0.25, recall=None,
            )
            for prompt in prompts
        ]  # fmt: skip


def run(folder: Path, generator: Parrot, plan: Plan, model: str = "m", attention: str = "dense") -> Results:
    results = Results(folder, writes=True)
    results.begin({"settings": {"seed": 1}, "models": {model: "a"}})
    results.mend()
    done = {key for key, _ in results.lines()}
    evaluate(generator, model, attention, plan, Maker(), results, done)  # type: ignore[arg-type]
    return results


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    plan = Plan([word(), word("other")], [64, 128], samples=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Parrot(dies_after=5), plan)
    path = tmp_path / "results.jsonl"
    assert len(path.read_text().splitlines()) == 5
    path.write_text(path.read_text()[:-9])  # the last line is half there
    again = Parrot()
    results = run(tmp_path, again, plan)
    assert len(again.asked) == 12 - 4
    keys = [key for key, _ in results.lines()]
    assert len(keys) == len(set(keys)) == 12
    assert {key.length for key in keys} == {64, 128} and {key.task for key in keys} == {"word", "other"}
    (first, second, average) = summary(results, {})
    assert first["lengths"]["64"]["score"] == pytest.approx(100 * 2 / 3)  # 0 and 2 of 0, 1, 2
    assert average["task"] == "average" and average["lengths"]["128"]["samples"] == 6
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == [first, second, average]


def test_prompts_of_a_length_are_answered_together_beside_answers_as_long(tmp_path: Path) -> None:
    class Batches(Parrot):
        def generate(self, prompts: Sequence[list[int]], limits: Sequence[int], **options: Any) -> list[Any]:
            asked.append(list(limits))
            return super().generate(prompts, limits, **options)

    asked: list[list[int]] = []
    long = replace(word("long"), new_tokens=9)
    plan = Plan([word(), long, word("other")], [64, 128], samples=3, batch=4)
    results = run(tmp_path / "batches", Batches(), plan)
    assert asked == [[4] * 4, [4, 4, 9, 9], [9]] * 2
    alone = run(tmp_path / "alone", Parrot(), replace(plan, batch=1))
    assert dict(results.lines()) == dict(alone.lines())


def test_a_task_with_few_samples_gives_them_all(tmp_path: Path) -> None:
    parrot = Parrot()
    run(tmp_path, parrot, Plan([word(samples=2)], [64], samples=5))
    assert len(parrot.asked) == 2


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    run(tmp_path, Parrot(), Plan([word()], [64], samples=1))
    results = Results(tmp_path, writes=True)
    with pytest.raises(UserError, match="holds results with seed 1, not 2; give another folder"):
        results.begin({"settings": {"seed": 2}, "models": {}})
    with pytest.raises(UserError, match="holds results of another model called m"):
        results.begin({"settings": {"seed": 1}, "models": {"m": "b"}})
    results.begin({"settings": {"seed": 1}, "models": {"n": "b"}})  # one more is welcome
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        results.begin({"settings": {"seed": 1}, "models": {}})
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match=r"has results\.jsonl without run\.json"):
        results.begin({"settings": {"seed": 1}, "models": {}})


def test_models_are_told_apart() -> None:
    class Config:
        def __init__(self, theta: float) -> None:
            self.theta = theta

        def to_dict(self) -> dict[str, Any]:
            return {"rope_theta": self.theta, "_name_or_path": str(id(self)), "dtype": "float32"}

    def model(value: float, theta: float) -> Any:
        made = nn.Linear(2, 2)
        nn.init.constant_(made.weight, value)
        nn.init.zeros_(made.bias)
        made.config = Config(theta)  # type: ignore[assignment]
        return made

    base = model_fingerprint(model(1.0, 1e4))
    assert base == model_fingerprint(model(1.0, 1e4))
    assert len({base, model_fingerprint(model(1.5, 1e4)), model_fingerprint(model(1.0, 1e5))}) == 3


def record(score: float, **more: Any) -> dict[str, Any]:
    return {"score": score, "removed": 0, "prompt_tokens": 10, "density": 0.5} | more


def test_averages_are_the_papers() -> None:
    lines = [
        (Key("m", "dense", "ruler", task, length, number), record(score))
        for task, length, number, score in [
            ("a", 4096, 0, 1.0), ("a", 4096, 1, 0.0), ("b", 4096, 0, 1.0), ("a", 8192, 0, 1.0), ("b", 8192, 0, 0.0),
            ("a", 16384, 0, 1.0),
        ]
    ]  # fmt: skip
    average = summarise(lines)[-1]
    assert {length: cell["score"] for length, cell in average["lengths"].items()} == {
        "4096": 75.0,
        "8192": 50.0,
    }
    assert average["mean"] == 62.5  # 16K lacks a task
    assert average["weighted_up"] == pytest.approx((75 + 2 * 50) / 3)
    assert average["weighted_down"] == pytest.approx((2 * 75 + 50) / 3)
    assert weighted([], rising=True) is None
    heads, cells = table(summarise(lines))
    assert heads == ["model", "attention", "task", "4K", "8K", "16K", "density"]
    assert cells[0] == ["m", "dense", "ruler a", "50.0", "100.0", "100.0", "0.500"]
    assert cells[2][3:6] == ["75.0", "50.0", "-"]


def test_heat_map(tmp_path: Path) -> None:
    lines = [
        (Key("m", "dense", "needle", "needle_words", length, number), record(score, details={"depth": depth}))
        for number, (length, depth, score) in enumerate(
            [(4096, 0.0, 1.0), (4096, 0.0, 0.0), (8192, 1.0, 1.0)]
        )
    ]
    (grid,) = needle_grids(lines).values()
    assert grid == {(4096, 0.0): 0.5, (8192, 1.0): 1.0}
    draw_needles(grid, "m, dense", tmp_path / "map.svg")
    text = (tmp_path / "map.svg").read_text()
    assert text.startswith("<?xml") and "<svg" in text


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("one two three")
    (tmp_path / "a.txt").write_text("four five")

    def tokenizer(text: str, verbose: bool) -> Any:
        return SimpleNamespace(input_ids=list(text.encode()))

    found = read_documents([tmp_path], tokenizer)
    assert found == [Document("a", list(b"four five"), 2), Document("b", list(b"one two three"), 3)]
    units = Plan([], [10, 12], documents=found, losses=True, words=True).units()
    # A document that is too short is left out of the lengths it does not reach; windows take any.
    assert [unit for unit in units if unit[0] == "ppl"] == [("ppl", "b", 10, 1), ("ppl", "b", 12, 1)]
    assert len([unit for unit in units if unit[0] == "words"]) == 4
    for path, message in ((tmp_path / "no", "does not exist"), (tmp_path / "x", "holds no .txt")):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            read_documents([path], tokenizer)


def test_a_fingerprint_looks_at_every_parameter() -> None:
    made = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    made.config = SimpleNamespace(to_dict=lambda: {})  # type: ignore[assignment]
    before = model_fingerprint(made)
    with torch.no_grad():
        made[1].bias += 1
    assert model_fingerprint(made) != before
