"""Questions and documents in published formats: readers, scores and the cut in the middle, to the command's table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from published_files import (
    BOOK,
    HOTPOTQA,
    INFINITEBENCH,
    SQUAD,
    infinitebench_folder,
    pg19_folder,
    write,
)
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from mtraining.cli import app
from mtraining.errors import UserError
from mtraining.evaluate.runner import read_documents
from mtraining.evaluate.tasks import SampleMaker, Sources, Task, build_tasks, published
from mtraining.inputs import hub

DOCUMENTS = tuple(INFINITEBENCH)


def task(name: str, **sources: Path) -> Task:
    (found,) = build_tasks(["ruler", "infinitebench"], [name], Sources(**sources))
    return found


def test_squads_questions(tmp_path: Path) -> None:
    asked, paragraphs = published.squad(write(tmp_path / "dev-v2.0.json", json.dumps(SQUAD), bom=True))
    assert [(one.text, one.answers) for one in asked] == [
        ("In what range does the Lenne rise?", ("the Kahl hills", "Kahl hills")),
        ("What was salt traded for?", ("amber", "Amber", "amber and furs")),
    ]
    assert len(paragraphs) == 3 and paragraphs[0].startswith("The Lenne rises")
    assert [one.own for one in asked] == [(0,), (2,)] and [one.related for one in asked] == [(0, 1), (2,)]


def test_squads_other_shapes_are_the_same(tmp_path: Path) -> None:
    """Compressed; in rows as the hub has them, in one array and in lines; and of version 1.1, which has no flag."""
    plain = published.squad(write(tmp_path / "plain.json", json.dumps(SQUAD)))
    rows = []
    for article in SQUAD["data"]:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                texts = [answer["text"] for answer in item["answers"]]
                rows.append(
                    {"id": item["id"], "title": article["title"], "context": paragraph["context"],
                     "question": item["question"], "answers": {"text": texts, "answer_start": [0] * len(texts)}}
                )  # fmt: skip
    older = json.loads(json.dumps(SQUAD))
    for article in older["data"]:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                item.pop("is_impossible")
    for path, text in {
        "dev.json.gz": json.dumps(SQUAD),
        "rows.json": json.dumps(rows),
        "rows.jsonl": "\n".join(map(json.dumps, rows)),
        "older.json": json.dumps(older),
    }.items():
        assert published.squad(write(tmp_path / path, text)) == plain, path


def test_an_empty_answer_is_no_answer(tmp_path: Path) -> None:
    """It stands in every prediction."""
    empty = json.loads(json.dumps(SQUAD))
    empty["data"][0]["paragraphs"][0]["qas"][0]["answers"] += [{"text": " ", "answer_start": 0}]
    asked, _ = published.squad(write(tmp_path / "empty.json", json.dumps(empty)))
    assert asked[0].answers == ("the Kahl hills", "Kahl hills")
    none = {
        "version": "v2.0",
        "data": [SQUAD["data"][0] | {"paragraphs": SQUAD["data"][0]["paragraphs"][1:]}],
    }
    with pytest.raises(UserError, match=r"--squad .*none\.json has no question with an answer"):
        published.squad(write(tmp_path / "none.json", json.dumps(none)))


def test_hotpotqas_questions(tmp_path: Path) -> None:
    asked, paragraphs = published.hotpotqa(write(tmp_path / "dev.json.gz", json.dumps(HOTPOTQA)))
    assert [one.answers for one in asked] == [("yes",), ("1911",)]
    assert len(asked[0].own) == 10 and len(paragraphs) == 20
    assert paragraphs[asked[0].own[2]] == "Ida Holm\nIda Holm is a painter. Ida Holm was born in 1911."
    rows = [
        row
        | {"context": {"title": [t for t, _ in row["context"]], "sentences": [s for _, s in row["context"]]}}
        for row in HOTPOTQA
    ]
    assert published.hotpotqa(write(tmp_path / "rows.json", json.dumps(rows))) == (asked, paragraphs)


def test_a_question_is_answered_by_any_of_its_answers(tmp_path: Path) -> None:
    squad = task("qa_1", squad=write(tmp_path / "squad.json", json.dumps(SQUAD)))
    found = squad.draft(1, Random(0), 1)
    assert (
        squad.score(" Amber, mostly", found.references) == 1 and squad.score(" silver", found.references) == 0
    )
    hotpot = task("qa_2", hotpotqa=write(tmp_path / "hotpot.json", json.dumps(HOTPOTQA)))
    found = hotpot.draft(1, Random(0), 0)
    assert hotpot.score(" Yes.", found.references) == 1 and hotpot.score(" no", found.references) == 0


def test_paragraphs_are_repeated_where_there_are_no_more(tmp_path: Path, maker: SampleMaker) -> None:
    """SQuAD's own end at about 160K tokens; longer samples must fill their length all the same."""
    source = write(tmp_path / "squad.json", json.dumps(SQUAD))
    sample = maker.make(task("qa_1", squad=source), 6000, 0)
    assert 6000 - 260 <= len(sample.ids) + sample.new_tokens <= 6000
    _, paragraphs = published.squad(source)
    assert sample.draft.prompt.count(paragraphs[0]) == 1  # the one that answers
    assert sample.draft.prompt.count(paragraphs[2]) > 5


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_document_task_reads_its_file(suffix: str, tmp_path: Path, maker: SampleMaker) -> None:
    folder = infinitebench_folder(tmp_path / "bench", suffix)
    right = {
        "longbook_sum_eng": ["It rained."], "longbook_qa_eng": ["ann lee", "the rain"],
        "longbook_choice_eng": ["B", "C. Carl", "Dora"], "longdialogue_qa_eng": ["Jackie"],
        "longbook_qa_chn": ["安妮。"], "code_debug": ["B. load"],
    }  # fmt: skip
    for name in DOCUMENTS:
        found = task(name, infinitebench=folder)
        assert found.samples == len(INFINITEBENCH[name])
        for number, prediction in enumerate(right[name]):
            sample = maker.make(found, 100_000, number)
            assert sample.removed == 0 and INFINITEBENCH[name][number]["context"] in sample.draft.prompt
            assert found.score(f" {prediction}", sample.draft.references) == 1, (name, number)
            assert found.score(" neither", sample.draft.references) < 0.5, (name, number)


def test_a_book_loses_its_middle_and_keeps_its_question(tmp_path: Path, maker: SampleMaker) -> None:
    found = task("longbook_choice_eng", infinitebench=infinitebench_folder(tmp_path / "bench"))
    sample = maker.make(found, 1000, 0)
    text = maker.tokenizer.decode(sample.ids)
    assert len(sample.ids) == 1000 - 40 and sample.removed == len(maker.encode(sample.draft)) - 960 > 2000
    assert text.startswith("Read the book") and "Chapter one." in text
    assert text.endswith("The end.\n\nQuestion: Who wrote?\nOnly one of these is right:\nA. Ann\nB. Bob\nC. Carl\n"
                         "D. Dora\nThe letter of the right answer is")  # fmt: skip


def test_pg19s_books(tmp_path: Path) -> None:
    def tokenizer(text: str, verbose: bool) -> Any:
        return SimpleNamespace(input_ids=list(text.encode()))

    one, two = read_documents([pg19_folder(tmp_path / "pg19")], tokenizer)
    assert (one.name, two.name) == ("10146", "10321")
    assert one.words == two.words == len(BOOK.split())
    assert bytes(one.tokens).decode() == BOOK and b"snow" in bytes(two.tokens)


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    damaged = tmp_path / "half.json.gz"
    damaged.write_bytes(write(tmp_path / "whole.json.gz", json.dumps(SQUAD)).read_bytes()[:-20])
    with pytest.raises(UserError, match=r"--squad .*half\.json\.gz cannot be read as JSON"):
        published.squad(damaged)
    with pytest.raises(
        UserError, match=r"--hotpotqa .*squad\.json does not look like HotpotQA's development file"
    ):
        published.hotpotqa(write(tmp_path / "squad.json", json.dumps(SQUAD)))
    with pytest.raises(UserError, match=r"--squad .*hotpot\.json does not look like SQuAD 2.0's"):
        published.squad(write(tmp_path / "hotpot.json", json.dumps(HOTPOTQA)))
    with pytest.raises(UserError, match=r"--squad .*none\.json does not exist"):
        published.squad(tmp_path / "none.json")
    with pytest.raises(UserError, match="--infinitebench .*nowhere does not exist"):
        published.infinitebench(tmp_path / "nowhere", "code_debug")
    folder = infinitebench_folder(tmp_path / "bench")
    write(folder / "code_debug.jsonl", '{"context": "x"}\n{"context": ')
    with pytest.raises(UserError, match=r"--infinitebench: .*code_debug\.jsonl cannot be read"):
        published.infinitebench(folder, "code_debug")
    wrong = INFINITEBENCH["code_debug"][0] | {"answer": ["unknown"]}
    write(folder / "code_debug.jsonl", json.dumps(wrong))
    published.infinitebench.cache_clear()
    with pytest.raises(UserError, match=r"row 1 of code_debug\.jsonl .* is not as published"):
        task("code_debug", infinitebench=folder).draft(0, Random(0), 0)


@pytest.fixture
def a_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """A hub that has the three data sets; yields what it was asked for."""
    asked: list[Any] = []
    rows = {
        "someone/squad": [
            {"title": "T", "context": "C", "question": "Q?", "answers": {"text": ["A"], "answer_start": [0]}}
        ],
        "someone/hotpot": [
            {"question": "Q?", "answer": "yes", "context": {"title": ["T"], "sentences": [["S."]]}}
        ],
    }

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return rows[name]

    def download(name: str, file: str, repo_type: str) -> str:
        asked.append((name, file, repo_type))
        return str(infinitebench_folder(tmp_path / "cache") / file)

    import datasets
    import huggingface_hub

    monkeypatch.setattr(hub, "find", lambda *args: {})
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    yield asked
    for reader in (published.squad, published.hotpotqa, published.infinitebench):
        reader.cache_clear()


def test_data_of_the_hub(a_hub: list[Any]) -> None:
    assert task("qa_1", squad=Path("someone/squad")).draft(1, Random(0), 0).references == ("A",)
    assert "T\nS." in task("qa_2", hotpotqa=Path("someone/hotpot")).draft(1, Random(0), 0).prompt
    found = task("code_debug", infinitebench=Path("someone/InfiniteBench"))
    assert found.samples == 1 and found.draft(0, Random(0), 0).references == ("B", "load")
    assert a_hub == [
        ("someone/squad", None, "validation"), ("someone/hotpot", "distractor", "validation"),
        ("someone/InfiniteBench", "code_debug.jsonl", "dataset"),  # and no file of a task that was not asked for
    ]  # fmt: skip


@pytest.mark.slow
def test_all_eight_tasks_by_the_command(tmp_path: Path, tokenizer: Any) -> None:
    """Dense beside sparse; prompts keep to the length, and documents lose what is beyond."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048,
    )  # fmt: skip
    model = tmp_path / "model"
    Qwen2ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    squad = write(tmp_path / "dev-v2.0.json", json.dumps(SQUAD), bom=True)
    hotpot = write(tmp_path / "hotpot_dev_distractor_v1.json.gz", json.dumps(HOTPOTQA))
    bench = infinitebench_folder(tmp_path / "bench", ".gz")
    options = (
        "block_size=16,top_k_columns=16,top_p=null,slash_by=block,slash_density=0.2,window=8,sinks=4,probe=16"
    )
    sparse = f"sparse:vertical_slash,{options}"
    told = CliRunner().invoke(
        app,
        ["evaluate", str(model), "--suite", "ruler", "--suite", "infinitebench", "--tasks",
         ",".join(("qa_1", "qa_2", *DOCUMENTS)), "--lengths", "1500", "--samples", "2", "--squad", str(squad),
         "--hotpotqa", str(hotpot), "--infinitebench", str(bench), "--attention", "dense", "--attention", sparse,
         "--device", "cpu", "--out", str(tmp_path / "out"), "--batch", "2"],
    )  # fmt: skip
    assert told.exit_code == 0, (told.output, told.exception)
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    expected = {"qa_1": 2, "qa_2": 2} | {name: min(2, len(rows)) for name, rows in INFINITEBENCH.items()}
    for attention in ("dense", sparse):
        mine = [record for record in records if record["attention"] == attention]
        assert {name: sum(one["task"] == name for one in mine) for name in expected} == expected
        for one in mine:
            found = task(one["task"], squad=squad, hotpotqa=hotpot, infinitebench=bench)
            assert one["prompt_tokens"] + found.new_tokens <= 1500
            assert (one["removed"] > 0) == found.fixed and one["references"]
            assert one["score"] == found.score(one["prediction"], one["references"])
            assert 0 < one["density"] <= 1 and (attention == "dense" or one["density"] < 1)
    assert "infinitebench average" in told.output
