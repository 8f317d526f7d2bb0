"""Small files in the shapes that SQuAD 2.0, HotpotQA, InfiniteBench and PG-19 are published in; the text is our own."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any


def write(path: Path, text: str, bom: bool = False) -> Path:
    """As UTF-8; compressed where the name says so."""
    content = text.encode("utf-8-sig" if bom else "utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def answered(number: int, question: str, *answers: str) -> dict[str, Any]:
    """A question as several annotators answered it, mostly alike."""
    found = [{"text": answer, "answer_start": 4 + number} for answer in answers]
    return {
        "question": question,
        "id": f"56ddde6b9a69{number:012x}",
        "answers": found,
        "is_impossible": False,
    }


def unanswerable(number: int, question: str) -> dict[str, Any]:
    return {
        "plausible_answers": [{"text": "the old bridge", "answer_start": 12}], "question": question,
        "id": f"5ad39d53604f{number:012x}", "answers": [], "is_impossible": True,
    }  # fmt: skip


SQUAD = {
    "version": "v2.0",
    "data": [
        {"title": "Lenne_River", "paragraphs": [
            {"qas": [
                answered(0, "In what range does the Lenne rise?", "the Kahl hills", "Kahl hills", "the Kahl hills"),
                unanswerable(1, "When was the Lenne drained?"),
            ], "context": "The Lenne rises in the Kahl hills \u2013 its \"old bridge\" was lost in 1925. " * 3},
            {"qas": [unanswerable(2, "Who drew the Lenne?")], "context": "Mills stood along the Lenne. " * 4},
        ]},
        {"title": "Salt", "paragraphs": [
            {"qas": [answered(3, "What was salt traded for?", "amber", "Amber", "amber and furs")],
             "context": "Salt was traded for amber and furs along the northern road. " * 3},
        ]},
    ],
}  # fmt: skip


def hotpot_row(number: int, kind: str, question: str, answer: str, gold: tuple[str, str]) -> dict[str, Any]:
    """Two paragraphs that answer, among eight that do not; one of these has no sentence."""
    context = [
        [f"Place {number}{other}", [f"Place {other} is a village.", " It has a mill."]] for other in range(7)
    ]
    context.insert(2, [gold[0], [f"{gold[0]} is a painter.", f" {gold[0]} was born in 1911."]])
    context.insert(5, [gold[1], [f"{gold[1]} is a painter, too."]])
    context.append([f"Empty {number}", []])
    return {
        "_id": f"5a8b57f25542995d1e6f{number:04x}", "answer": answer, "question": question,
        "supporting_facts": [[gold[0], 0], [gold[1], 0]], "context": context, "type": kind, "level": "hard",
    }  # fmt: skip


HOTPOTQA = [
    hotpot_row(0, "comparison", "Are Ida Holm and Per Ek both painters?", "yes", ("Ida Holm", "Per Ek")),
    hotpot_row(1, "bridge", "When was the teacher of Nils Ask born?", "1911", ("Ulla By", "Nils Ask")),
]

BOOK = "Chapter one. " + "The rain went on, and nobody spoke of the letter. " * 60 + "The end."
OPTIONS = ["Ann", "Bob", "Carl", "Dora"]
INFINITEBENCH: dict[str, list[dict[str, Any]]] = {
    "longbook_sum_eng": [{"id": 0, "context": BOOK, "input": "", "answer": ["It rained."], "options": []}],
    "longbook_qa_eng": [
        {"id": 0, "context": BOOK, "input": "Who wrote the letter?", "answer": ["Ann", "Ann Lee"], "options": []},
        {"id": 1, "context": BOOK, "input": "What fell?", "answer": ["Rain"], "options": []},
    ],
    "longbook_choice_eng": [
        {"id": 0, "context": BOOK, "input": "Who wrote?", "answer": ["Bob"], "options": OPTIONS},
        {"id": 1, "context": BOOK, "input": "Who wrote?", "answer": ["Carl", "C"], "options": OPTIONS},
        {"id": 2, "context": BOOK, "input": "Who wrote?", "answer": "D", "options": OPTIONS},
    ],
    "longdialogue_qa_eng": [
        {"id": 0, "context": "INT. MILL - DAY\n\n\t\t$$MASK$$\n\tIt rains.\n" * 90, "input": "",
         "answer": ["JACKIE", "JACK"], "options": []},
    ],
    "longbook_qa_chn": [
        {"id": 0, "context": "雨下个不停，谁也不提那封信。" * 90, "input": "信是谁写的？", "answer": ["安妮"],
         "options": []},
    ],
    "code_debug": [
        {"id": 0, "context": "def load(path):\n    return open(path).raed()\n\n" * 40, "input": "Which one?",
         "answer": ["load"], "options": ["save", "load", "main", "Reader.close"]},
    ],
}  # fmt: skip


def infinitebench_folder(folder: Path, suffix: str = "") -> Path:
    """All six files, one row a line and an empty line at the end."""
    folder.mkdir(exist_ok=True)
    for name, rows in INFINITEBENCH.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write(folder / f"{name}.jsonl{suffix}", lines + "\n", bom=not suffix)
    return folder


def pg19_folder(folder: Path) -> Path:
    """One folder of numbered books for each split, beside metadata.csv, as the corpus is laid out."""
    (folder / "test").mkdir(parents=True)
    write(folder / "test" / "10146.txt", BOOK, bom=True)
    write(folder / "test" / "10321.txt.gz", BOOK.replace("rain", "snow"))
    write(
        folder / "metadata.csv", "10146,The Letter,1911,http://x/10146\n10321,The Snow,1899,http://x/10321\n"
    )
    return folder
