"""Published questions and documents: SQuAD 2.0, HotpotQA and InfiniteBench, as files or by an id of the model hub.

Files are those that the authors publish, plain or as .gz. The hub keeps SQuAD and HotpotQA in rows of another shape;
these are read from the hub itself, or from a file that was exported from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mtraining.errors import UserError, first_line
from mtraining.inputs import hub
from mtraining.inputs.text import read_text

INFINITEBENCH = "xinrongzhang2022/InfiniteBench"


class Question(NamedTuple):
    """A question on paragraphs.

    Attributes:
        answers: any of them is right.
        own: numbers of the paragraphs that the question comes with.
        related: numbers of the paragraphs of the same article, its own among them.
    """

    text: str
    answers: tuple[str, ...]
    own: Sequence[int]
    related: Sequence[int]


@cache
def squad(source: Path) -> tuple[list[Question], list[str]]:
    """SQuAD's answerable questions, and all paragraphs.

    Args:
        source: the development file, or a hub id such as rajpurkar/squad_v2.

    Raises:
        UserError: nothing there, or something else.
    """
    content = _content(source, "--squad", None)
    try:
        articles = list(_articles(content))
        places = _numbered(text for article in articles for text, _ in article)
        asked = []
        for article in articles:
            related = tuple(dict.fromkeys(places[text] for text, _ in article))
            for text, questions in article:
                for question, answers in questions:
                    # An unanswerable question has none, and an empty one stands in every prediction.
                    right = tuple(dict.fromkeys(answer for answer in answers if answer.strip()))
                    if right:
                        asked.append(Question(question, right, (places[text],), related))
    except (KeyError, TypeError, AttributeError) as error:
        raise _odd(source, "--squad", "SQuAD 2.0", error) from None
    return _some(asked, source, "--squad", "SQuAD 2.0"), list(places)


@cache
def hotpotqa(source: Path) -> tuple[list[Question], list[str]]:
    """HotpotQA's questions, each with all paragraphs that it comes with, and all paragraphs.

    Args:
        source: the development file of the distractor setting, or a hub id such as hotpotqa/hotpot_qa.

    Raises:
        UserError: nothing there, or something else.
    """
    content = _content(source, "--hotpotqa", "distractor")
    try:
        rows = [(row["question"], row["answer"], list(_paragraphs(row["context"]))) for row in content]
        places = _numbered(text for *_, texts in rows for text in texts)
        asked = [
            Question(question, (answer,), tuple(dict.fromkeys(places[text] for text in texts)), ())
            for question, answer, texts in rows
            if answer.strip()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _odd(source, "--hotpotqa", "HotpotQA", error) from None
    return _some(asked, source, "--hotpotqa", "HotpotQA"), list(places)


@cache
def infinitebench(source: Path, name: str) -> tuple[dict[str, Any], ...] | None:
    """The rows of one of InfiniteBench's files; None where a folder has no such file.

    Args:
        source: a folder with NAME.jsonl or NAME.jsonl.gz, or the data set's hub id.

    Raises:
        UserError: no such folder, or a damaged file.
    """
    option = "--infinitebench"
    if source.is_dir():
        file = next((path for end in ("", ".gz") if (path := source / f"{name}.jsonl{end}").exists()), None)
        if file is None:
            return None
    else:
        _find(source, option, f"give the folder that holds {name}.jsonl, or {INFINITEBENCH}")
        file = _fetched(source, option, f"{name}.jsonl")
    try:
        return tuple(json.loads(line) for line in read_text(file).split("\n") if line.strip())
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {file} cannot be read ({error}); fetch the file again.") from None


def _articles(content: Any) -> Iterator[list[tuple[str, list[tuple[str, list[str]]]]]]:
    """Articles as lists of (paragraph, its questions with their answers), of the published file or of rows."""
    if isinstance(content, Mapping):
        for article in content["data"]:
            yield [
                (
                    paragraph["context"],
                    [(item["question"], _answers(item)) for item in paragraph["qas"]],
                )
                for paragraph in article["paragraphs"]
            ]
        return
    titles: dict[str, dict[str, list[tuple[str, list[str]]]]] = {}
    for row in content:
        paragraphs = titles.setdefault(row["title"], {})
        paragraphs.setdefault(row["context"], []).append((row["question"], list(row["answers"]["text"])))
    for paragraphs in titles.values():
        yield list(paragraphs.items())


def _answers(item: Mapping[str, Any]) -> list[str]:
    return [] if item.get("is_impossible") else [answer["text"] for answer in item["answers"]]


def _paragraphs(context: Any) -> Iterator[str]:
    """Title and sentences of each paragraph; the hub keeps titles and sentences in two lists."""
    pairs = (
        zip(context["title"], context["sentences"], strict=True) if isinstance(context, Mapping) else context
    )
    for title, sentences in pairs:
        yield f"{title}\n{''.join(sentences)}"


def _numbered(texts: Iterable[str]) -> dict[str, int]:
    """Each different text with its number, by first appearance."""
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def _some(asked: list[Question], source: Path, option: str, name: str) -> list[Question]:
    if not asked:
        raise UserError(f"{option} {source} has no question with an answer; give {name}'s development file.")
    return asked


def _content(source: Path, option: str, config: str | None) -> Any:
    """JSON, JSON lines, or the validation rows of a data set of the hub."""
    if not source.exists():
        return _rows_of_hub(source, option, config)
    try:
        text = read_text(source)
        try:
            return json.loads(text)
        except ValueError:
            lines = [line for line in text.split("\n") if line.strip()]
            if len(lines) < 2:
                raise
            return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{option} {source} cannot be read as JSON ({error}); give the published file."
        ) from None


def _find(source: Path, option: str, remedy: str) -> None:
    hub.find(str(source), f"{option} {source}", "dataset", remedy)


def _rows_of_hub(source: Path, option: str, config: str | None) -> Any:
    _find(source, option, "give the published file")
    from datasets import load_dataset

    try:
        with hub.quiet():
            return list(load_dataset(str(source), config, split="validation"))
    except Exception as error:  # the library's, the hub's and the transport's own kinds
        raise UserError(
            f"{option} {source} has no validation rows that can be loaded ({first_line(error)}); give the published "
            "file."
        ) from error


def _fetched(source: Path, option: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with hub.quiet():
            return Path(hf_hub_download(str(source), file, repo_type="dataset"))
    except Exception as error:  # the hub's and the transport's own kinds
        raise UserError(
            f"{option} {source} has no {file} that can be fetched ({first_line(error)}); give a folder that holds it."
        ) from error


def _odd(source: Path, option: str, name: str, error: Exception) -> UserError:
    return UserError(
        f"{option} {source} does not look like {name}'s development file ({type(error).__name__}: {error}); give the "
        f"published one."
    )
