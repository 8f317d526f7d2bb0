"""Tables and figures of whatever a study has: CSV files, one page of markdown, and SVG figures.

STUDY/summary/*.csv, summary.md, *.svg
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import compared
import found
from archive import noted
from arms import Plan
from compared import OWN
from drawings import draw
from found import DENSE, Row, Study

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
    "keys": found.key_rows,
    "balance": found.balance_rows,
    "stability": found.stability_rows,
    "compared": compared.compared_rows,
    "bar": compared.bar_rows,
    "time": compared.time_rows,
}


# Questions of `compared`, with the titles of their tables.
QUESTIONS = {
    compared.TO_DENSE: "Sparse training less dense training",
    compared.FROZEN: "Index frozen at the first step less an evolving one",
    compared.FULL: "Reading with full attention less reading sparsely",
    compared.NOISE: "Second seed less the first",
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
    commit, hardware = noted(folder, "commit"), noted(folder, "hardware")
    for name, table in rows.items():
        write_csv(out / f"{name}.csv", table, commit, hardware)
    draw(rows, out)
    text = page(study, rows, commit)
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def write_csv(path: Path, rows: Sequence[Row], commit: str, hardware: str) -> None:
    """One table, each row with commit and hardware. Without rows its file is removed: it is of an earlier state."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "commit", "hardware"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: _exact(value) for key, value in row.items()} | {"commit": commit, "hardware": hardware}
            for row in rows
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
        _section(
            "Held-out loss while training, beside that of dense training after the same seconds of steps",
            _times(rows["time"]),
        ),
        _section("Trained x read: held-out loss after training", _grid(rows["grid"])),
        _section(
            "The bar: held-out loss within 1 % of dense training's at every bucket of positions, tasks within noise",
            _bar(rows["bar"]),
        ),
        *(
            _section(f"{title}: {part} (95 % interval over samples)", table)
            for question, title in QUESTIONS.items()
            for part, table in _compared(rows["compared"], question)
        ),
        _section("Tasks, percent", _by_length(rows["tasks"], "length", _score)),
        _section("Loss of a span that stands again after a gap", _by_length(rows["copy"], "gap", _again)),
        *(
            _section(
                f"First step with {share} % of answers given, by distance", _steps_to(rows["answers"], share)
            )
            for share in (50, 90)
        ),
        _section("Answers given at the last checkpoint, percent by distance", _last_answers(rows["answers"])),
        _section(
            "Key positions without gradient from queries at a distance, percent (in the last step / in all steps)",
            _keys(rows["keys"]),
        ),
        _section(
            "Index shared with the untrained model's, and with the step before, percent", _stability(rows)
        ),
        _section(
            "Balance of the last index in a ring, max over mean of work (over ranks / over steps)",
            _balance(rows["balance"]),
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
    head = ["arm", *(f"from {_from(column)}" for column in columns), "all"]
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
    between = "" if math.isnan(row["low"]) else f" ({row['low']:.0f}, {row['high']:.0f})"
    return f"{row['score']:.0f}{between}"


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


def _last_answers(rows: Sequence[Row]) -> str:
    last: dict[str, int] = {}
    for row in rows:
        last[row["model"]] = max(row["step"], last.get(row["model"], 0))
    shown = [
        {**row, "model": f"{row['model']}, step {row['step']}"}
        for row in rows
        if row["step"] == last[row["model"]]
    ]
    return _by_length(shown, "from", lambda row: f"{row['given']:.0f}")


def _times(rows: Sequence[Row]) -> str:
    head = ["run", "step", "seconds", "read", "loss", "dense after the same seconds"]
    body = []
    for row in rows:
        equal = row["dense_after_same_seconds"]
        text = "-" if equal is None else f"{equal:.4f}"
        name = f"{row['arm']}-{row['seed']}"
        body.append(
            [name, str(row["step"]), f"{row['seconds']:.0f}", row["read"], f"{row['loss']:.4f}", text]
        )
    return markdown(head, body)


def _compared(rows: Sequence[Row], question: str) -> Iterator[tuple[str, str]]:
    """Of each kind of measure, what its differences are in and a table of them: a line for each pair of models and ways
    of reading, a column for each place or task."""
    kinds = {
        compared.LOSS: f"{compared.LOSS} from each position on, in percent of it",
        compared.COPY: f"{compared.COPY} by its gap, in nats",
        "": "tasks and answers, in percent points",
    }
    for kind, title in kinds.items():
        lines: dict[tuple[str, ...], dict[str, str]] = {}
        for row in rows:
            if row["question"] == question and (row["measure"] if row["measure"] in kinds else "") == kind:
                scale = 100 / row["other"] if kind == compared.LOSS else 1.0
                at = row["at"] if row["at"] == "all" else _from(row["at"])
                column = at if kind else f"{row['measure']}, {at}"
                name = row["model"], row["read"], row["against"], row["against_read"]
                numbers = (scale * row[part] for part in ("difference", "low", "high"))
                lines.setdefault(name, {})[column] = _between(*numbers)
        columns = list(dict.fromkeys(column for line in lines.values() for column in line))
        # Of checkpoints, the last one alone: a table of its own has them all.
        early = [column for column in columns if column.startswith(compared.ANSWERS)]
        early = sorted(early, key=lambda column: int(column.split(",")[0].split()[-1]))[:-1]
        columns = [column for column in columns if column not in early]
        body = [[*name, *(line.get(c, "-") for c in columns)] for name, line in lines.items()]
        if body:
            yield title, markdown(["model", "read", "less", "read", *columns], body)


def _from(tokens: int) -> str:
    return tokens_text(tokens) if tokens else "0"


def _between(value: float, low: float, high: float) -> str:
    """A difference with its interval, where there is one."""
    return f"{value:+.2f}" + ("" if math.isnan(low) else f" ({low:+.2f}, {high:+.2f})")


def _bar(rows: Sequence[Row]) -> str:
    body = [
        [
            row["model"], row["read"], _percent(1 - row["density"]), f"{row['time']:.2f}",
            f"{_from(row['worst_from'])}: {_between(*(row[part] for part in ('worst', 'worst_low', 'worst_high')))}",
            f"{row['tasks_below']} of {row['tasks']}", row["met"],
        ]
        for row in rows
    ]  # fmt: skip
    head = [
        "model", "read", "sparsity in training", "time of a step, of dense", "worst bucket, %",
        "tasks below dense beyond noise", "met",
    ]  # fmt: skip
    return markdown(head, body)


def _keys(rows: Sequence[Row]) -> str:
    lines: dict[str, dict[int, str]] = {}
    for row in rows:
        # Later steps take the place of earlier ones.
        name = f"{row['arm']}-{row['seed']}"
        lines.setdefault(name, {})[row["from"]] = f"{100 * row['in_step']:.1f} / {100 * row['so_far']:.1f}"
    starts = sorted({start for line in lines.values() for start in line})
    head = ["run", *(f"from {_from(start)}" for start in starts)]
    return markdown(
        head, [[name, *(line.get(start, "-") for start in starts)] for name, line in lines.items()]
    )


def _balance(rows: Sequence[Row]) -> str:
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        name = f"{row['arm']}-{row['seed']}", row["layout"]
        lines.setdefault(name, {})[row["ranks"]] = f"{row['worker']:.2f} / {row['step']:.2f}"
    ranks = sorted({number for line in lines.values() for number in line})
    head = ["run", "layout", *(f"{number} ranks" for number in ranks)]
    return markdown(head, [[*name, *(line.get(n, "-") for n in ranks)] for name, line in lines.items()])


def _stability(rows: dict[str, list[Row]]) -> str:
    last = {(row["model"], row["read"]): row["step"] for row in rows["stability"]}
    body = []
    for (model, read), step in last.items():
        layers = [
            row
            for row in rows["stability"]
            if (row["model"], row["read"], row["step"]) == (model, read, step)
        ]
        shared = [_mean([row[part] for row in layers]) for part in ("columns", "tiles")]
        kept = [
            row
            for row in rows["layers"]
            if f"{row['arm']}-{row['seed']}" == model and row["kept"] is not None
        ]
        ends = [
            _mean([row["kept"] for row in kept if row["step"] == at["step"]]) for at in (kept[:1] + kept[-1:])
        ]
        # What training kept is of its own pattern.
        trained = read == OWN or (model, OWN) not in last
        moved = " to ".join(_percent(end) for end in ends) if trained and ends else "-"
        body.append([model, read, *map(_percent, shared), moved])
    head = ["model", "read", "columns", "tiles", "kept from the step before, first to last"]
    return markdown(head, body)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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
