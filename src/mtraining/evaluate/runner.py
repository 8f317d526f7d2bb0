"""Runs an evaluation: every model under every attention on every sample, and a line of results for each.

All ranks of a ring run this together and see the same samples; the first one writes. A line is written when its sample
ends. A sample that has a line is not made again, so a killed run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtraining.errors import UserError
from mtraining.evaluate.perplexity import document_losses, whole_document_nll
from mtraining.evaluate.results import SUMMARY, Key, Results
from mtraining.evaluate.summary import summarise
from mtraining.evaluate.tasks import Sample, SampleMaker, Task
from mtraining.generate import Generator
from mtraining.inputs.text import read_text, replace_text, text_files
from mtraining.ring import Observer, chosen

Tell = Callable[[Key, int, int], None]
Unit = tuple[str, str, int, int]  # suite, task or document, length, number
_RECALL_ROWS = 128  # where a plan asks for recall and names no number


@dataclass(frozen=True)
class Document:
    """A text to be foreseen.

    Attributes:
        tokens: of the whole text, by the model's tokenizer.
        words: separated by white space, as PG-19 counts them.
    """

    name: str
    tokens: Sequence[int]
    words: int


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    Attributes:
        tasks: that are answered and scored.
        lengths: tokens of prompt and answer together, ascending.
        samples: of each task and length.
        documents: for ``losses``, ``words`` and ``recall``.
        losses: perplexity by position, of the documents' first tokens.
        words: perplexity by word, of whole documents in windows of each length.
        recall: share of attention mass that the pattern keeps, by layer.
        bucket, last: positions a bucket of perplexity spans; last tokens that are summed apart.
        recall_rows: query rows of each sequence whose recall is measured; 0 measures density alone.
        batch: prompts answered together; each is read by itself, so answers do not depend on it.
    """

    tasks: Sequence[Task]
    lengths: Sequence[int]
    samples: int = 10
    documents: Sequence[Document] = ()
    losses: bool = False
    words: bool = False
    recall: bool = False
    bucket: int = 8192
    last: int = 1024
    recall_rows: int = 0
    batch: int = 1

    def units(self) -> list[Unit]:
        """(suite, task, length, number) of every sample, short ones first, so that mistakes show early."""
        found: list[Unit] = []
        for length in sorted(self.lengths):
            for task in self.tasks:
                count = self.samples if task.samples is None else min(self.samples, task.samples)
                found += [(task.suite, task.name, length, number) for number in range(count)]
            for suite, wanted in (("ppl", self.losses), ("words", self.words), ("recall", self.recall)):
                for number, document in enumerate(self.documents if wanted else ()):
                    if suite == "words" or len(document.tokens) >= length:
                        found.append((suite, document.name, length, number))
        return found


def evaluate(
    generator: Generator,
    model: str,
    attention: str,
    plan: Plan,
    maker: SampleMaker,
    results: Results,
    done: set[Key],
    tell: Tell | None = None,
) -> None:
    """Run what is not done yet of one model under one attention. Collective over the generator's ranks.

    Args:
        model, attention: names under which the results stand.
        done: keys that have a line already, the same on every rank.
        tell: called after each batch with its last key, and how many of how many are done.
    """
    tasks = {task.name: task for task in plan.tasks}
    units = plan.units()
    todo = [unit for unit in units if Key(model, attention, *unit) not in done]
    finished = len(units) - len(todo)
    for group in together(todo, tasks, plan.batch):
        suite, _, length, number = group[0]
        if _is_answered(group[0], tasks):
            samples = [maker.make(tasks[unit[1]], *unit[2:]) for unit in group]
            records = _answered(generator, samples, plan.recall_rows)
        else:
            records = [_read(generator, suite, plan.documents[number], length, plan)]
        keys = [Key(model, attention, *unit) for unit in group]
        for key, record in zip(keys, records, strict=True):
            results.add(key, record)
        finished += len(group)
        if tell is not None:
            tell(keys[-1], finished, len(units))


def summary(results: Results, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of everything in the folder, which are also written beside it with ``about``."""
    rows = summarise(results.lines())
    if results.writes:
        content = {"about": dict(about), "rows": rows}
        replace_text(results.folder / SUMMARY, json.dumps(content, indent=1) + "\n")
    return rows


def read_documents(paths: Sequence[Path], tokenizer: Any, longest: int | None = None) -> list[Document]:
    """Every text file given, and every .txt file of the folders given, in order.

    Args:
        longest: tokens of each that are needed; None for all of them.

    Raises:
        UserError: nothing there, or no text.
    """
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"--text {path} does not exist; give a text file or a folder of .txt files.")
        found = text_files(path)
        if not found:
            raise UserError(f"--text {path} holds no .txt file; give a text file or a folder of them.")
        files += found
    documents = []
    for file in files:
        try:
            text = read_text(file)
        except (OSError, ValueError) as error:
            raise UserError(f"--text {file} cannot be read as text ({error}); leave it out.") from None
        words = len(text.split())
        # No tokenizer needs 16 characters a token.
        shown = text if longest is None else text[: 16 * longest]
        name = file.name.removesuffix(".gz").removesuffix(".txt")
        documents.append(Document(name, list(tokenizer(shown, verbose=False).input_ids), words))
    return documents


def _is_answered(unit: Unit, tasks: Mapping[str, Task]) -> bool:
    suite, name, *_ = unit
    return name in tasks and tasks[name].suite == suite


def together(units: Sequence[Unit], tasks: Mapping[str, Task], batch: int) -> Iterator[list[Unit]]:
    """What is answered at one length, at most ``batch`` at a time; perplexity and recall one by one.

    A batch is decoded until its longest answer ends, so samples stand beside those with answers as long as their own.
    """
    for length in sorted({unit[2] for unit in units}):
        mine = [unit for unit in units if unit[2] == length]
        answered = [unit for unit in mine if _is_answered(unit, tasks)]
        answered.sort(key=lambda unit: tasks[unit[1]].answer_tokens(length))
        for start in range(0, len(answered), batch):
            yield answered[start : start + batch]
        for unit in mine:
            if not _is_answered(unit, tasks):
                yield [unit]


def _answered(generator: Generator, samples: Sequence[Sample], recall_rows: int) -> list[dict[str, Any]]:
    answers = generator.generate(
        [sample.ids for sample in samples], [sample.new_tokens for sample in samples], recall_rows=recall_rows
    )
    return [
        {
            "prompt_tokens": answer.prompt_tokens,
            "removed": sample.removed,
            "prediction": answer.text,
            "references": list(sample.draft.references),
            "score": sample.task.score(answer.text or "", sample.draft.references),
            "details": dict(sample.draft.details),
            "new_tokens": len(answer.tokens),
            "finish_reason": answer.finish_reason,
            "prefill_seconds": round(answer.prefill_seconds, 4),
            "decode_seconds": round(answer.decode_seconds, 4),
            "density": answer.density,
            "recall": answer.recall,
        }
        for sample, answer in zip(samples, answers, strict=True)
    ]


def _read(generator: Generator, suite: str, document: Document, length: int, plan: Plan) -> dict[str, Any]:
    """A record of a document: its losses, or what its attention keeps."""
    if suite == "words":
        nll, count = whole_document_nll(generator, document.tokens, length)
        return {"nll": nll, "tokens": count, "words": document.words, "prompt_tokens": len(document.tokens)}
    rows = plan.recall_rows or _RECALL_ROWS if suite == "recall" else 0
    with Observer(rows) as observer:
        if suite == "recall":
            generator.prefill(document.tokens[:length])
            record: dict[str, Any] = {
                "recall_by_layer": [None if one.window else one.recall for one in observer.stats]
            }
        else:
            record = document_losses(generator, document.tokens, length, plan.bucket, plan.last).record()
    sparse = chosen(observer.stats)
    densities = [stats.density for stats in sparse]
    recalls = [stats.recall for stats in sparse if stats.recall is not None]
    return record | {
        "prompt_tokens": length,
        "density": sum(densities) / len(densities) if densities else None,
        "recall": sum(recalls) / len(recalls) if recalls else None,
    }
