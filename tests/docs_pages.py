"""The pages of the project, and what stands in them: fenced blocks, command lines, code spans."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    body: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.body.splitlines()[0][:60] if self.body else ''}"


def blocks(*languages: str) -> list[Block]:
    """Every fenced block of the given languages (of all, where none is given), page by page."""
    found = []
    for page in PAGES:
        for match in FENCE.finditer(page.read_text(encoding="utf-8")):
            body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
            found.append(Block(page, match["language"].strip(), body))
    return [block for block in found if not languages or block.language in languages]


def command_lines(text: str) -> list[str]:
    """The commands of a bash block: continued lines joined, comments and blank lines left out.

    One that runs another command inside is left as it stands.
    """
    lines = text.replace("\\\n", " ").splitlines()
    found = [(line.strip(), shlex.split(line, comments=True)) for line in lines]
    return [line if "$(" in line else shlex.join(words) for line, words in found if words]


def page_commands(name: str) -> list[str]:
    """The commands of the page with this file name."""
    return [line for block in blocks("bash") if block.page.name == name for line in command_lines(block.body)]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What stands in single or double backticks, on one line or wrapped over two."""
    return [
        " ".join(span.split())
        for _, span in re.findall(r"(?<!`)(``?)(?!`)(.+?)(?<!`)\1(?!`)", text, re.DOTALL)
    ]
