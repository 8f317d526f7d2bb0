"""What cannot be evaluated is refused before the first step, in one sentence that names the option."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import evaluated, raw_config, tiny_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import mtraining.train.loop as loop
from mtraining.cli import main
from mtraining.data import PrepareOptions, prepare
from mtraining.errors import UserError
from mtraining.evaluate.in_training import build_suite
from mtraining.train.checks import check_config
from mtraining.train.config import parse_config
from mtraining.train.metrics import read_metrics


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"every": 0}, r"^evaluate\.every=0 in .* is not valid: input should be greater than 0"),
        ({"every": 5}, r"^evaluate\.every=5 evaluates nothing; give held-out text as evaluate\.data"),
        ({"data": "x"}, r"^evaluate\.data has no effect without evaluate\.every"),
        ({"bucket": 64}, r"^evaluate\.bucket has no effect without evaluate\.every"),
        ({"every": 5, "suites": ["needles"]}, r"^evaluate\.suites\.0='needles' in .*'needle'"),
        ({"every": 5, "suites": ["needle"], "keep_best": True}, r"^evaluate\.keep_best compares held-out losses"),
        ({"every": 5, "data": "x", "lengths": [1]}, r"^evaluate\.lengths\.0=1 in .*greater than or equal to 2"),
        ({"every": 5, "data": "x", "lengths": [64, 64]}, r"^evaluate\.lengths names one of its entries twice"),
        ({"every": 5, "data": "x", "attention": []}, r"^evaluate\.attention=\[\] in .*at least 1 item"),
        ({"every": 5, "data": "x", "attention": ["sparse"]}, r"^evaluate\.attention\.0='sparse' .*'train' or 'dense'"),
        ({"every": 5, "data": "x", "bucket": 1}, r"^evaluate\.bucket=1 in .*greater than or equal to 2"),
        ({"evry": 5}, r"^unknown key evaluate\.evry in .*did you mean evaluate\.every"),
    ],
)  # fmt: skip
def test_options(tmp_path: Path, section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        tiny_config(tmp_path / "run", tmp_path, evaluate=section)
    assert "\n" not in str(raised.value)


def refused(tmp_path: Path, shards: Path, **section: Any) -> str:
    """The sentence of what is looked at before processes start."""
    with pytest.raises(UserError) as raised:
        check_config(tiny_config(tmp_path / "run", shards, evaluate={"every": 2, **section}))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_data_that_is_absent_or_too_short(tmp_path: Path, shards: Path, unseen: Path) -> None:
    assert refused(tmp_path, shards, data=str(tmp_path / "none")).startswith(
        f"evaluate.data: dataset '{tmp_path / 'none'}' does not exist; run `mtraining prepare"
    )
    assert refused(tmp_path, shards, data=str(unseen), lengths=[100, 902]) == (
        f"evaluate.lengths: no document of evaluate.data={unseen} has 902 tokens, the longest, 'unseen1.txt', has 901; "
        "ask for shorter sequences, or add longer documents."
    )
    raw = raw_config(tmp_path / "run", shards, evaluate={"every": 2, "data": str(unseen), "lengths": [1914]})
    raw["data"]["mode"] = "concat"
    concat = parse_config(raw)
    with pytest.raises(
        UserError, match=r"^evaluate\.lengths: 1914 tokens are more than the 1913 of evaluate\.data="
    ):
        check_config(concat)


def test_the_training_data_itself(tmp_path: Path, shards: Path) -> None:
    """Also where it lies elsewhere; and where single documents of it are held out by mistake."""
    import shutil

    copy = shutil.copytree(shards, tmp_path / "copy")
    sentence = refused(tmp_path, shards, data=str(copy))
    assert sentence.startswith(f"evaluate.data={copy} holds the documents of data.path={shards}, so its loss")
    for names in (("count1",), ("count2", "other")):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            source = shards.parent / f"{name}.txt"
            text = source.read_text() if source.exists() else "text that nobody trains on " * 20
            (folder / f"{name}.txt").write_text(text)
        prepare(PrepareOptions(sources=(str(folder),), out=folder / "shards", kind="text"), progress=False)
    common: dict[str, Any] = {"train": {"steps": 2}, "checkpoint": {"every": 0}}
    every_one = {"every": 2, "data": str(tmp_path / "count1" / "shards")}
    with pytest.raises(
        UserError, match=r"every document that would be read, such as 'count1\.txt', stands in data"
    ):
        loop.train(tiny_config(tmp_path / "run", shards, **common, evaluate=every_one))
    assert not read_metrics(tmp_path / "run")


def test_some_shared_documents_are_warned_of(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    for name, text in (
        ("own", "text that nobody trains on " * 20),
        ("twin", (shards.parent / "count2.txt").read_text()),
    ):
        (tmp_path / "text" / f"{name}.txt").write_text(text)
    out = tmp_path / "held"
    prepare(PrepareOptions(sources=(str(tmp_path / "text"),), out=out, kind="text"), progress=False)
    loop.train(
        tiny_config(tmp_path / "run", shards, train={"steps": 2}, evaluate={"every": 2, "data": str(out)})
    )
    assert (
        f"warning: 1 of the 2 documents that are read of evaluate.data={out}, such as 'twin.txt', stand in "
        f"data.path={shards} too"
    ) in capsys.readouterr().out


def test_text_of_another_tokenizer(tmp_path: Path, shards: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(["</s>", "?", *map(str, range(200))])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "words")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(" ".join(map(str, range(200))) * 3)
    options = PrepareOptions(
        sources=(str(tmp_path / "text"),),
        out=tmp_path / "held",
        kind="text",
        tokenizer=str(tmp_path / "words"),
    )
    prepare(options, progress=False)
    sentence = refused(tmp_path, shards, data=str(tmp_path / "held"))
    assert sentence.startswith(
        f"evaluate.data={tmp_path / 'held'} was prepared with another tokenizer than data.path={shards} (token "
    )
    assert "in the other); prepare it again with --tokenizer" in sentence


def test_ids_beyond_the_vocabulary(tmp_path: Path, shards: Path, unseen: Path) -> None:
    from mtraining.data import TokenShards
    from mtraining.train.heldout import check_words

    last = TokenShards(unseen).max_token_id
    check_words(TokenShards(unseen), last + 1)
    with pytest.raises(UserError, match=f"holds token id {last}, outside the model's vocabulary of {last}"):
        check_words(TokenShards(unseen), last)


def refused_by_train(config: Any, suites: Any = None) -> str:
    with pytest.raises(UserError) as raised:
        loop.train(config, suites)
    assert "\n" not in str(raised.value) and not read_metrics(config.output)
    return str(raised.value)


def test_lengths_beyond_the_models_positions(tmp_path: Path, shards: Path, unseen: Path) -> None:
    config = tiny_config(
        tmp_path / "run", shards, evaluate={"every": 2, "data": str(unseen), "lengths": [128, 300]}
    )
    assert refused_by_train(config) == (
        "evaluate.lengths: 300 tokens are beyond the 256 positions of the model; ask for shorter sequences, or stretch "
        "its positions with model.rope."
    )


def test_needles_that_cannot_be_asked(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section: dict[str, Any] = {"every": 2, "suites": ["needle"], "essays": str(tmp_path / "none")}

    def config(**more: Any) -> Any:
        return tiny_config(tmp_path / "run", shards, evaluate={**section, **more})

    assert "give train() suites=mtraining.evaluate.in_training.build_suite" in refused_by_train(config())
    assert refused_by_train(config(), build_suite).startswith(
        f"evaluate.suites=needle: evaluate.essays={tmp_path / 'none'} does not exist; give a text file"
    )
    (tmp_path / "essay.txt").write_text("One sentence. " * 50)
    essays = {"essays": str(tmp_path / "essay.txt")}
    assert refused_by_train(config(**essays), build_suite).startswith(
        "evaluate.suites=needle: evaluate.lengths: task needle_numbers and its answer of 32 tokens do not fit into "
        "256; use a longer length."
    )
    monkeypatch.setattr("mtraining.evaluate.tasks.haystack.find_spec", lambda name: None)
    assert "give evaluate.essays=FILE_OR_FOLDER, or install those" in refused_by_train(
        config(essays=None), build_suite
    )
    from mtraining.evaluate.tasks import words

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("mtraining.evaluate.tasks.words.resources.files", absent)
    words.word_list.cache_clear()
    try:
        assert refused_by_train(config(**essays), build_suite).endswith(
            "come from the package wonderwords; install mtraining[evaluate]."
        )
    finally:
        words.word_list.cache_clear()


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.sweep])])
def test_the_command_asks_needles(
    tmp_path: Path, shards: Path, unseen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    nproc: int,
) -> None:  # fmt: skip
    (tmp_path / "essay.txt").write_text("The quick fox jumps. " * 50)
    raw = raw_config(
        tmp_path / "run", shards, train={"seq_len": 512, "steps": 1, "warmup_steps": 0, "micro_batch_size": 1},
        parallel={"cp": nproc},
        evaluate={
            "every": 1, "data": str(unseen), "suites": ["needle"], "needle_samples": 2,
            "essays": str(tmp_path / "essay.txt"), "at_start": False, "attention": ["dense", "train"],
        },
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    launch = [] if nproc == 1 else ["--nproc", str(nproc)]
    monkeypatch.setattr(sys, "argv", ["mtraining", "train", str(tmp_path / "recipe.yaml"), *launch])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    (record,) = evaluated(read_metrics(tmp_path / "run"))
    assert record["step"] == 1
    assert [(row["attention"], row["task"], row["length"], row["samples"]) for row in record["suites"]] == [
        (attention, task, 512, 2)
        for attention in ("dense", "train")
        for task in ("needle_numbers", "needle_words", "needle_several")
    ]
    assert all(0 <= row["score"] <= 100 for row in record["suites"])
    if nproc == 1:  # processes of its own write to the terminal itself
        out = capsys.readouterr().out
        line = next(
            line for line in out.splitlines() if line.startswith("evaluation at step 1: held-out loss ")
        )
        assert "needle_numbers 0 % at 512 tokens (dense)" in line


def test_scores_are_those_of_the_answers() -> None:
    """A generator that knows every answer, one that knows none, and one that is asked to stop."""
    import re
    from types import SimpleNamespace

    from mtraining.evaluate.in_training import TrainingSuite
    from mtraining.evaluate.tasks.base import Draft, Task

    def draft(size: int, rng: Any, number: int) -> Draft:
        return Draft(f"{'x ' * size}the number is {number}7", "", (f"{number}7",))

    def score(prediction: str, references: Any) -> float:
        return float(prediction == references[0])

    class Maker:
        def make(self, task: Task, length: int, number: int) -> Any:
            made = task.make(length, None, number, length)  # type: ignore[arg-type]
            return SimpleNamespace(ids=made, new_tokens=4, draft=made)

    class Reader:
        def generate(self, prompts: Any, new_tokens: int) -> Any:
            found = re.search(r"is (\d+)", prompts[0].prompt)
            assert found is not None
            return [SimpleNamespace(text=found[1] if found[1] != "07" else None)]

    suite = TrainingSuite([Task("t", "needle", 4, score, draft)], (8, 16), 4, Maker())  # type: ignore[arg-type]
    rows = suite(Reader(), lambda: False)  # type: ignore[arg-type]
    assert rows == [
        {"suite": "needle", "task": "t", "length": length, "samples": 4, "score": 75.0} for length in (8, 16)
    ]
    left = iter([False, False, True])
    assert suite(Reader(), lambda: next(left)) is None  # type: ignore[arg-type]


def test_a_run_from_python_needs_no_suites_where_none_is_asked(
    tmp_path: Path, shards: Path, unseen: Path
) -> None:
    raw = raw_config(
        tmp_path, shards, train={"steps": 2}, evaluate={"every": 9, "data": str(unseen), "at_start": False}
    )
    loop.train(parse_config(raw))
    assert [one["step"] for one in evaluated(read_metrics(tmp_path))] == [2]
