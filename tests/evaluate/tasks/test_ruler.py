"""RULER's tasks: shape, counts, needle positions and references of generated samples."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from mtraining.errors import UserError
from mtraining.evaluate.tasks import SampleMaker, Sources, build_tasks
from mtraining.evaluate.tasks.base import Draft, Task
from mtraining.evaluate.tasks.haystack import NOISE, NaturalText
from mtraining.evaluate.tasks.words import distinct_words, vocabulary

NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")


def tasks(essays: Path | None = None, **files: Path) -> dict[str, Task]:
    return {task.name: task for task in build_tasks(["ruler"], sources=Sources(essays, **files))}


def draft(task: Task, size: int, number: int = 0, seed: int = 0) -> Draft:
    return task.draft(size, Random(seed), number)


def test_there_are_thirteen(essays: Path) -> None:
    assert list(tasks(essays)) == [
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
        "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, needles, references, kind",
    [
        ("niah_single_1", 1, 1, r"\d{7}"), ("niah_single_2", 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, r"[0-9a-f-]{36}"), ("niah_multikey_1", 4, 1, r"\d{7}"),
        ("niah_multikey_2", 121, 1, r"\d{7}"), ("niah_multikey_3", 121, 1, r"[0-9a-f-]{36}"),
        ("niah_multivalue", 4, 4, r"\d{7}"), ("niah_multiquery", 4, 4, r"\d{7}"),
    ],
)  # fmt: skip
def test_needles(name: str, needles: int, references: int, kind: str, essays: Path) -> None:
    found = draft(tasks(essays)[name], 120)
    context = NEEDLE.findall(found.prompt)
    assert len(context) == needles
    assert len(found.references) == references
    assert all(re.fullmatch(kind, value) for _, _, value in context)
    queries = found.cue.split(" for ")[1].rsplit(" that ")[0].replace(", and ", ", ").split(", ")
    assert {value for _, key, value in context if key in queries} == set(found.references)
    assert len({value for _, _, value in context}) == needles  # no value twice


def test_one_value_is_asked_in_the_singular(essays: Path) -> None:
    one, several = draft(tasks(essays)["niah_single_2"], 50), draft(tasks(essays)["niah_multivalue"], 50)
    assert one.prompt.startswith("A special magic number is hidden") and one.cue.endswith(" names is")
    assert several.prompt.startswith("Some special magic numbers are") and several.cue.endswith(" names are")


def test_needles_stand_at_the_depths_that_are_told(essays: Path) -> None:
    found = draft(tasks(essays)["niah_multiquery"], 2000)
    context = found.prompt.split("\n", 1)[1]
    places = [match.start() / len(context) for match in NEEDLE.finditer(context)]
    assert places == pytest.approx(found.details["depths"], abs=0.06)
    assert all(depth * 39 == pytest.approx(round(depth * 39), abs=0.01) for depth in found.details["depths"])


def test_noise_lines_are_counted(essays: Path) -> None:
    assert draft(tasks(essays)["niah_single_1"], 77).prompt.count(NOISE) == 77


def test_a_chain_of_variables() -> None:
    found = draft(tasks()["vt"], 40)
    example, sample = found.prompt.split("\n\nThe text below hides")
    statements = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample)
    names = [name for name, _ in statements]
    assert found.references == tuple(names) and len(set(names)) == 5 and all(len(name) == 5 for name in names)
    assert [value for _, value in statements[1:]] == names[:-1]  # each is given the one before
    value = statements[0][1]
    assert re.fullmatch(r"\d{5}", value) and f"hold {value}" in found.cue and f"value {value} at" in sample
    example_names = re.findall(r"VAR (\w+) =", example)
    assert example.endswith(" ".join(example_names)) and all(len(name) == 3 for name in example_names)
    assert sample.count(NOISE) == 40


@pytest.mark.parametrize("length, size, common, other", [(4096, 150, 30, 3), (4095, 40, 6, 1)])
def test_common_words(length: int, size: int, common: int, other: int) -> None:
    found = tasks()["cwe"].make(size, Random(0), 0, length)
    lists = re.findall(r"Remember those\.\n(.*)\nQuestion", found.prompt)
    counts = Counter(re.findall(r"\d+\. (\S+(?: [^\d\s]\S*)*)", lists[1]))
    assert len(lists) == 2 and len(counts) == size
    assert {word for word, count in counts.items() if count == common} == set(found.references)
    assert sorted(set(counts.values())) == [other, common]
    numbers = [int(number) for number in re.findall(r"(\d+)\. ", lists[1])]
    assert numbers == list(range(1, 10 * common + (size - 10) * other + 1))


def test_words_beyond_the_vocabulary_are_made_up() -> None:
    count = len(vocabulary()) + 50
    assert len(vocabulary()) == 8166 and len(set(distinct_words(count, Random(0)))) == count


def test_frequencies_of_coded_words_fall_by_the_square_of_their_rank() -> None:
    found = draft(tasks()["fwe"], 2000)
    counts = Counter(found.prompt.split(" for nothing.\n")[1].split("\nQuestion")[0].split())
    total = 2000 * 6 / 3.141592653589793**2
    assert counts["..."] == int(total)
    assert [counts[word] for word in found.references] == [int(total / 4), int(total / 9), int(total / 16)]
    assert [word for word, _ in counts.most_common(4)] == ["...", *found.references]
    assert len(counts) <= 2000 // 50


def squad_file(folder: Path) -> Path:
    paragraphs = [f"Paragraph {n} tells of river number {n}." for n in range(6)]

    def article(numbers: range) -> dict[str, object]:
        rows = [
            {"context": paragraphs[n], "qas": [
                {"question": f"Which river is told of in {n}?", "answers": [{"text": f"river number {n}"}] * 2},
                {"question": "What is not said?", "answers": [], "is_impossible": True},
            ]} for n in numbers
        ]  # fmt: skip
        return {"title": "rivers", "paragraphs": rows}

    path = folder / "squad.json"
    path.write_text(json.dumps({"data": [article(range(3)), article(range(3, 6))]}), encoding="utf-8")
    return path


def test_questions_on_paragraphs(tmp_path: Path) -> None:
    task = tasks(squad=squad_file(tmp_path))["qa_1"]
    found = draft(task, 2, number=4)
    shown = re.findall(r"Document \d+:\n(.*)", found.prompt)
    assert found.references == ("river number 4",) and "in 4?" in found.prompt
    # Its own paragraph, and first those of the same article.
    assert sorted(shown) == [f"Paragraph {n} tells of river number {n}." for n in (3, 4, 5)]
    assert len(re.findall(r"Document \d+:", draft(task, 5, number=4).prompt)) == 6
    assert (
        draft(task, 1, number=6).references == draft(task, 1, number=0).references
    )  # impossible ones are left out


def test_questions_over_two_documents(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"q{n}",
            "answer": f"a{n}",
            "context": [[f"t{n}{i}", ["One. ", "Two."]] for i in range(3)],
        }
        for n in range(4)
    ]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    found = draft(tasks(hotpotqa=path)["qa_2"], 2, number=1)
    assert found.references == ("a1",) and found.prompt.endswith("Question: q1")
    assert all(f"t1{i}\nOne. Two." in found.prompt for i in range(3))
    assert len(re.findall(r"Document \d+:", found.prompt)) == 5


@pytest.mark.parametrize("name, option", [("qa_1", "--squad"), ("qa_2", "--hotpotqa")])
def test_absent_questions_are_said(name: str, option: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"task {name}.*{option} FILE"):
        draft(tasks()[name], 2)
    odd = tmp_path / "odd.json"
    odd.write_text('{"rows": []}', encoding="utf-8")
    given = tasks(squad=odd) if name == "qa_1" else tasks(hotpotqa=odd)
    with pytest.raises(UserError, match=f"{option} .*odd.json does not look like"):
        draft(given[name], 2)


def test_natural_text_is_repeated_and_cut_at_the_word() -> None:
    text = NaturalText("One two three. Four five! Six?", "t")
    assert text.sentences == ["One two three.", "Four five!", "Six?"]
    for count in range(1, 20):
        words = " ".join(text.first_words(count)).split(" ")
        assert words == ("One two three. Four five! Six?".split() * 4)[:count]


def test_samples_differ_and_repeat(maker: SampleMaker, essays: Path) -> None:
    task = tasks(essays)["niah_single_2"]
    first, second = maker.make(task, 1500, 0), maker.make(task, 1500, 1)
    assert first.ids != second.ids
    again = SampleMaker(maker.tokenizer)
    assert again.make(task, 1500, 1).ids == second.ids  # whatever was made before
    assert SampleMaker(maker.tokenizer, seed=1).make(task, 1500, 0).ids != first.ids
