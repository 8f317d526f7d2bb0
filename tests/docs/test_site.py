"""The site builds strictly, asks nothing of the network, and its written pages and figures are those of the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import BaseModel

from docs_pages import ROOT
from processes import run_command

DOCS = ROOT / "docs"
# Attributes from which a browser loads by itself; links that a reader clicks are not among them.
LOADS = {
    ("script", "src"),
    ("img", "src"),
    ("iframe", "src"),
    ("link", "href"),
    ("source", "src"),
    ("image", "href"),
}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Loads(HTMLParser):
    """What a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if value and (tag, name) in LOADS]


def loads(html: str) -> list[str]:
    parser = Loads()
    parser.feed(html)
    return parser.found


def outside(address: str) -> bool:
    return bool(re.match(r"(https?:)?//", address))


def test_what_a_page_loads_is_told_from_what_it_links_to() -> None:
    page = '<a href="https://a.org">a</a><script src="//b.org/x.js"></script><link href="c.css">'
    assert [address for address in loads(page) if outside(address)] == ["//b.org/x.js"]


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_outside(tmp_path: Path) -> None:
    words = [
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(ROOT / "mkdocs.yml"),
        "--site-dir",
        str(tmp_path),
    ]
    run_command([sys.executable, *words], cwd=ROOT)
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 50
    wrong = {
        (str(page.relative_to(tmp_path)), address)
        for page in pages
        for address in loads(page.read_text(encoding="utf-8"))
        if outside(address)
    }
    assert wrong == set()
    for sheet in tmp_path.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\"']*", sheet.read_text()) == [], sheet
    # The theme fetches a script for diagrams of this kind where a page has one.
    assert [page.name for page in pages if 'class="mermaid"' in page.read_text(encoding="utf-8")] == []
    said = (tmp_path / "reference" / "cli.html").read_text(encoding="utf-8")
    assert "mtraining bench train" in said and "<!-- commands" not in said
    python = (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")
    assert "context-parallel shards" in python and ":func:" not in python and ":class:" not in python


def test_every_page_is_in_the_menu_or_named_here() -> None:
    """A page that no menu has is found by search alone."""
    menu = set(re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert menu == pages


def test_the_configuration_page_is_that_of_the_code() -> None:
    writer = load(DOCS / "write_pages.py")
    assert writer.PAGE.read_text(encoding="utf-8") == writer.configuration_page(), "run make docs"


def test_every_option_has_a_meaning() -> None:
    writer = load(DOCS / "write_pages.py")
    lacking = [
        f"{path}.{name}"
        for path, model in writer.sections()
        for name, _, _, meaning in writer.options_of(model)
        if not meaning
    ]
    for name, pattern in writer.PATTERNS.items():
        lacking += [f"{name}.{option}" for option, _, _, said in writer.pattern_options(pattern) if not said]
    assert lacking == []


def test_a_section_without_words_is_noticed() -> None:
    class Bare(BaseModel):
        """One option has a meaning.

        Attributes:
            told: what it does,
                over two lines.
        """

        told: int = 1
        untold: int = 2

    writer = load(DOCS / "write_pages.py")
    assert writer.options_of(Bare) == [
        ("told", "whole number", "`1`", "what it does, over two lines."),
        ("untold", "whole number", "`2`", ""),
    ]


def test_figures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    """Word for word with the version of matplotlib that drew them; with any other, that they can be drawn.

    Bitmaps inside are left aside: how they are packed depends on other libraries.
    """

    def text(path: Path) -> str:
        return re.sub(r"data:image/png;base64,[^\"]*", "", path.read_text(encoding="utf-8"))

    drawer = load(DOCS / "figures" / "draw.py")
    drawn = {path.name: text(path) for path in drawer.draw(tmp_path)}
    kept = {path.name: text(path) for path in (DOCS / "figures").glob("*.svg")}
    assert set(drawn) <= set(kept)
    # A figure of another script: one that names it.
    scripts = " ".join(path.read_text(encoding="utf-8") for path in (DOCS / "figures").glob("*.py"))
    assert [name for name in set(kept) - set(drawn) if name not in scripts] == []
    by_other = drawer.matplotlib.__version__ != drawer.DRAWN_WITH
    changed = [name for name, figure in drawn.items() if figure != kept[name]]
    assert by_other or changed == [], "run python docs/figures/draw.py"


def test_every_figure_is_on_a_page() -> None:
    shown = " ".join(page.read_text(encoding="utf-8") for page in [*DOCS.rglob("*.md"), ROOT / "README.md"])
    assert [
        path.name for path in (DOCS / "figures").glob("*.svg") if f"figures/{path.name}" not in shown
    ] == []


def test_issue_forms_are_forms() -> None:
    """What a forge needs of each: a name, a description, and parts with an id of their own."""
    forms = [
        path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"
    ]
    assert {form.stem for form in forms} == {"bug", "wrong-result", "slow"}
    for form in forms:
        content = yaml.safe_load(form.read_text())
        assert content["name"] and content["description"]
        ids = [part["id"] for part in content["body"]]
        assert len(set(ids)) == len(ids) and "env" in ids
        assert all(part["attributes"]["label"] for part in content["body"])


def test_the_map_of_rooms_is_complete() -> None:
    """docs/architecture.md has a line for each room, and no other."""
    said = re.findall(r"^\| `(\w+)/` \|", (DOCS / "architecture.md").read_text(), flags=re.MULTILINE)
    rooms = {path.parent.name for path in (ROOT / "src" / "mtraining").glob("*/__init__.py")}
    assert sorted(said) == sorted(rooms)
