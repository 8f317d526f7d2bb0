"""Tables and figures of whatever a study has: CSV files, one page of markdown, and SVG figures.

STUDY/summary/*.csv, summary.md, *.svg
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import found
from arms import Plan
from drawings import draw
from found import DENSE, Row, Study

from mtraining.bench.record import code_version
from mtraining.sizes import tokens_text

TABLES: dict[str, Callable[[Study], list[Row]]] = {
    "arms": found.arm_rows,
    "loss": found.loss_rows,
    "held-out": found.held_out_rows,
    "grid": found.grid_rows,
    "positions": found.position_rows,
    "tasks": found.task_rows,
    "copy": found.copy_rows,
    "answers": found.answer_rows,
    "layers": found.layer_rows,
    "coverage": found.coverage_rows,
    "stability": found.stability_rows,
}


def summarise(folder: Path, plan: Plan) -> str:
    """Write the tables and figures of a study.

    Returns:
        the page of markdown, which names what is missing.
    """
    study = Study(folder, plan)
    rows = {name: make(study) for name, make in TABLES.items()}
    out = folder / "summary"
    out.mkdir(parents=True, exist_ok=True)
    commit = code_version()
    for name, table in rows.items():
        write_csv(out / f"{name}.csv", table, commit)
    draw(rows, out)
    text = page(study, rows, commit)
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def write_csv(path: Path, rows: Sequence[Row], commit: str) -> None:
    """One table, each row with the commit; a table without rows removes its file, which is of an earlier state."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "commit"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {**{key: _exact(value) for key, value in row.items()}, "commit": commit} for row in rows
        )


def page(study: Study, rows: dict[str, list[Row]], commit: str) -> str:
    """The page for a reader."""
    train = study.plan.config["train"]
    parts = [
        f"# {study.plan.name}: {tokens_text(train['seq_len'])} tokens a sequence, "
        f"{train['batch_size']} sequences a step, commit {commit}",
        _section("Arms", _arms(rows["arms"])),
        _section(
            "Held-out loss by position, less that of dense training, in percent of it "
            "(95 % interval over documents)",
            _differences(rows["held-out"]),
        ),
        _section("Trained x read: held-out loss after training", _grid(rows["grid"])),
        _section("Tasks, percent", _by_length(rows["tasks"], "length", _score)),
        _section("Loss of a span that stands again after a gap", _by_length(rows["copy"], "gap", _again)),
        *(
            _section(
                f"First step with {share} % of answers given, by distance", _steps_to(rows["answers"], share)
            )
            for share in (50, 90)
        ),
        _section(
            "Index shared with the untrained model's (columns / diagonals)", _stability(rows["stability"])
        ),
        _section("Missing", "\n".join(f"- {line}" for line in study.missing) or "nothing"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _arms(rows: Sequence[Row]) -> str:
    dense = next((row["tokens_per_second"] for row in rows if row["arm"] == DENSE), None)
    body = [
        [
            f"{row['arm']}-{row['seed']}", str(row["steps"]), f"{row['tokens'] / 1e6:.1f}M", f"{row['loss']:.4f}",
            f"{row['tokens_per_second']:,.0f}",
            "-" if dense is None else f"{row['tokens_per_second'] / dense:.2f}x",
            _percent(row["density"]), _percent(row["recall"]), _percent(row["uncovered_far"]),
            _percent(row["uncovered_run_far"]),
        ]
        for row in rows
    ]  # fmt: skip
    head = [
        "arm-seed", "steps", "tokens", "loss, last 5 steps", "tokens/s", "of dense", "density", "recall",
        "far distances without gradient, last step", "ever",
    ]  # fmt: skip
    return markdown(head, body)


def _differences(rows: Sequence[Row]) -> str:
    """A line for each run and way of reading, at the last step that it shares with dense training."""
    lines: dict[str, dict[Any, str]] = {}
    dense = {(row["seed"], row["step"], row["from"]): row["loss"] for row in rows if row["arm"] == DENSE}
    for row in rows:
        if row["arm"] == DENSE:
            last = max(
                other["step"] for other in rows if other["arm"] == DENSE and other["seed"] == row["seed"]
            )
            if row["step"] in (0, last):
                name = f"dense-{row['seed']}, step {row['step']}: its loss"
                lines.setdefault(name, {})[row["from"]] = f"{row['loss']:.4f}"
            continue
        shared = [
            other["step"]
            for other in rows
            if (other["arm"], other["seed"]) == (row["arm"], row["seed"]) and other["difference"] is not None
        ]
        if not shared or row["step"] != max(shared):
            continue
        of = dense[row["seed"], row["step"], row["from"]] / 100
        name = f"{row['arm']}-{row['seed']} read {row['read']}, step {row['step']}"
        low, high = row["low"] / of, row["high"] / of
        lines.setdefault(name, {})[row["from"]] = f"{row['difference'] / of:+.2f} ({low:+.2f}, {high:+.2f})"
    columns = sorted({column for line in lines.values() for column in line if column != "all"})
    head = ["arm", *(f"from {tokens_text(column)}" for column in columns), "all"]
    return markdown(
        head,
        [[name, *(line.get(column, "-") for column in [*columns, "all"])] for name, line in lines.items()],
    )


def _grid(rows: Sequence[Row]) -> str:
    reads = list(dict.fromkeys(row["read"] for row in rows))
    cells = {(row["model"], row["read"]): row for row in rows}
    body = []
    for model in dict.fromkeys(row["model"] for row in rows):
        line = [model]
        for read in reads:
            row = cells.get((model, read))
            line.append(
                "-"
                if row is None
                else f"{row['loss']:.4f} ({_percent(row['density'])} density, {_percent(row['recall'])} recall)"
            )
        body.append(line)
    return markdown(["model", *(f"read {read}" for read in reads)], body)


def _by_length(rows: Sequence[Row], key: str, cell: Callable[[Row], str]) -> str:
    lengths = sorted({row[key] for row in rows})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["read"], row.get("task", "")), {})[row[key]] = cell(row)
    named = any(task for *_, task in lines)
    head = ["model", "read", *(["task"] if named else []), *map(tokens_text, lengths)]
    body = [
        [*(part for part in name[: 3 if named else 2]), *(line.get(length, "-") for length in lengths)]
        for name, line in lines.items()
    ]
    return markdown(head, body)


def _score(row: Row) -> str:
    return f"{row['score']:.0f} ({row['low']:.0f}, {row['high']:.0f})"


def _again(row: Row) -> str:
    return f"{row['again']:.2f} (first {row['first']:.2f})"


def _steps_to(rows: Sequence[Row], share: float) -> str:
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in found.steps_to(rows, share):
        step = "never" if row["step"] is None else str(row["step"])
        lines.setdefault((row["model"], row["read"]), {})[row["from"]] = step
    starts = sorted({start for line in lines.values() for start in line})
    head = ["model", "read", *(f"from {start}" for start in starts)]
    return markdown(head, [[*name, *(line.get(s, "-") for s in starts)] for name, line in lines.items()])


def _stability(rows: Sequence[Row]) -> str:
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["model"], row["read"]), []).append(row)
    body = []
    for (model, read), layers in lines.items():
        columns = [row["columns"] for row in layers if row["columns"] is not None]
        diagonals = [row["diagonals"] for row in layers]
        shared = [sum(part) / len(part) if part else None for part in (columns, diagonals)]
        body.append([model, read, " / ".join(_percent(part) for part in shared)])
    return markdown(["model", "read", "mean over layers"], body)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; "" without rows."""
    if not body:
        return ""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _exact(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
