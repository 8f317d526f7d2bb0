"""Put what a study found into the repository: tables beside the other results, figures and one page of documentation.

benchmarks/results/study-PLAN-NAME-TABLE.csv
docs/figures/study/PLAN-FIGURE.svg
docs/study-PLAN.md
mkdocs.yml, docs/study.md           a line each, that leads to the page
"""

from __future__ import annotations

import shutil
from pathlib import Path

from archive import noted
from arms import Plan
from tables import TABLES, summarise

from mtraining.errors import UserError

_LIST = "<!-- results -->"

# Thousands of lines, which the figures show.
LONG = ("layers", "loss")
ALT = {
    "loss": "training loss by step and by seconds",
    "held-out": "held-out loss by position",
    "copy": "loss of a repeated span by its gap",
    "layers": "density and recall by layer",
    "coverage": "share of far distances without gradient over steps",
    "answers": "share of answers given over steps",
}


def publish(study: Path, plan: Plan, name: str, root: Path) -> list[Path]:
    """Write the tables, figures and page of a study.

    Args:
        name: of this campaign, such as h100-2026-11-27.
        root: of the repository.

    Returns:
        what was written.

    Raises:
        UserError: a page that shall lead to the new one is not as it was.
    """
    body = summarise(study, plan).split("\n\n", 1)[1]
    written = []
    for table in TABLES:
        source = study / "summary" / f"{table}.csv"
        if source.exists() and table not in LONG:
            written.append(root / "benchmarks" / "results" / f"study-{plan.name}-{name}-{table}.csv")
            shutil.copyfile(source, written[-1])
    figures = []
    for figure, about in ALT.items():
        source = study / "summary" / f"{figure}.svg"
        target = root / "docs" / "figures" / "study" / f"{plan.name}-{figure}.svg"
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        if source.exists():
            shutil.copyfile(source, target)
            figures.append(f"![{about}](figures/study/{target.name})")
            written.append(target)
    head = (
        f"# Results of {plan.name}\n\n"
        f"Written by `python recipes/study publish`. What the arms are and what is measured: [the study](study.md).\n\n"
        f"Hardware: {noted(study, 'hardware')}. Commit {noted(study, 'commit')}. Tables: "
        f"`benchmarks/results/study-{plan.name}-{name}-arms.csv` and others beside it."
    )
    page = root / "docs" / f"study-{plan.name}.md"
    page.write_text("\n\n".join([head, body.strip(), *figures]) + "\n", encoding="utf-8")
    return [*written, page, *_lead_to(page, f"Results of {plan.name}", root)]


def _lead_to(page: Path, title: str, root: Path) -> list[Path]:
    """Lines that lead to a page, in the navigation and in the list of results; what is there already is kept."""
    changed = []
    for path, before, line in (
        (root / "mkdocs.yml", "study.md", f"{title}: {page.name}"),
        (root / "docs" / "study.md", _LIST, f"- [{title}]({page.name})"),
    ):
        lines = path.read_text(encoding="utf-8").splitlines()
        place = next((number for number, text in enumerate(lines) if text.endswith(before)), None)
        if place is None:
            raise UserError(
                f"{path} has no line that ends with {before!r}, behind which the new page is named."
            )
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        new = f"{indent}- {line}" if path.suffix == ".yml" else line
        if new not in lines:
            lines.insert(place + 1, new)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            changed.append(path)
    return changed
