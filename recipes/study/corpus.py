"""The text of a study: novels and source code, some of each held out.

    corpus/text/          training text, a file a work
    corpus/held-out-text/ parts of held-out works, each long enough for one sequence
    corpus/tokens, corpus/held-out: the same as token shards

Held-out works are cut into parts, so that a confidence interval has several documents to stand on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mtraining.data import PrepareOptions, prepare
from mtraining.data.code import package_source, stdlib_source
from mtraining.data.sources import Item
from mtraining.errors import UserError

SPARE = 64  # tokens of a part beyond one sequence: a part cut out of its text may take a few more or fewer


def make(study: Path, corpus: Mapping[str, Any], seq_len: int, novels: Path | None) -> str:
    """Write the corpus of a study; what is there already is kept.

    Args:
        corpus: of the plan: ``tokenizer``, ``code`` (sources of `mtraining prepare`), ``code_held_out``,
            ``novels_held_out``, ``parts_held_out``, ``max_tokens``.
        novels: a folder of .txt files; None trains and evaluates on code alone.

    Returns:
        what was written, for a person.

    Raises:
        UserError: a held-out novel that is not there, or too little held-out text for one sequence.
    """
    folder = study / "corpus"
    text, unseen = folder / "text", folder / "held-out-text"
    text.mkdir(parents=True, exist_ok=True)
    works = {path.stem: path for path in sorted(novels.glob("*.txt"))} if novels is not None else {}
    held = list(corpus.get("novels_held_out", ())) if works else []
    for name in held:
        if name not in works:
            raise UserError(f"--novels {novels} has no {name}.txt, which the plan holds out; add it.")
    for name, path in works.items():
        if name not in held:
            shutil.copyfile(path, text / path.name)
    with_text = [str(text)] if set(works) - set(held) else []
    options = PrepareOptions(
        sources=(*with_text, *corpus["code"]),
        out=folder / "tokens",
        tokenizer=corpus["tokenizer"],
        max_tokens=corpus["max_tokens"],
    )
    done = [prepare(options, progress=False)]
    if not unseen.is_dir():
        tokenizer = Tokenizer.from_file(str(folder / "tokens" / "tokenizer" / "tokenizer.json"))
        queues = [
            list(named_parts(name, works[name].read_text(encoding="utf-8"), tokenizer, seq_len))
            for name in held
        ]
        queues.append(list(named_parts("code", code_text(corpus["code_held_out"]), tokenizer, seq_len)))
        parts = in_turns(queues)[: corpus["parts_held_out"]]
        if not parts:
            raise UserError(
                f"corpus: no held-out work has {seq_len} tokens; hold out a longer one, or lower config.train.seq_len."
            )
        unseen.mkdir()
        for name, part in parts:
            (unseen / f"{name}.txt").write_text(part, encoding="utf-8")
    options = replace(options, sources=(str(unseen),), out=folder / "held-out", kind="text", max_tokens=None)
    done.append(prepare(options, progress=False))
    told = [summary.render(limit=3) for summary in done]
    if not works:
        told.append(
            "no novels were given (--novels): this study trains and is evaluated on source code alone"
        )
    return "\n".join(told)


def named_parts(name: str, text: str, tokenizer: Tokenizer, seq_len: int) -> Iterator[tuple[str, str]]:
    """A work cut into parts of a little over ``seq_len`` tokens; the rest of it is left out."""
    size = seq_len + SPARE
    starts = [start for start, _ in tokenizer.encode(text, add_special_tokens=False).offsets]
    for number, first in enumerate(range(0, len(starts) - size, size)):
        yield f"{name}-{number}", text[starts[first] : starts[first + size]]


def in_turns(queues: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[str, str]]:
    """The first part of every work, then the second of every work that has one, and so on."""
    return [part for turn in zip_longest(*queues) for part in turn if part is not None]


def code_text(source: str) -> str:
    """All Python files of a source as one text: ``stdlib`` (without its tests) or ``package:NAME``."""
    options: dict[str, Any] = {"group_by": "folder", "extensions": (".py",)}
    if source == "stdlib":
        found = stdlib_source(**options)
    elif source.startswith("package:"):
        found = package_source(source.removeprefix("package:"), **options)
    else:
        raise UserError(f"corpus.code_held_out={source!r} is not known; give stdlib or package:NAME.")
    files = [file for item in found.items() if isinstance(item, Item) for file in item.files]
    return "\n".join(
        f"# {shown}\n{path.read_text(encoding='utf-8', errors='replace')}" for shown, path in files
    )
