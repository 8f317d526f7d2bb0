"""`mtraining report`: runs side by side on one page."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtraining.report.chart import Chart
from mtraining.report.charts import build_charts, dense_run
from mtraining.report.evaluated import score_table
from mtraining.report.figures import write_figures
from mtraining.report.page import Section, html_table, page, write_page
from mtraining.report.runs import Run, duration, known, number, read_runs
from mtraining.report.series import differences
from mtraining.report.specs import colour_of

REPORT = "report.html"
# Sections by the charts that they hold.
_SECTIONS = (
    ("training", "Training", ("loss", "loss-difference", "throughput", "gradient-norm")),
    ("quality", "Held-out loss and scores", ("held-out", "by-position", "suites", "needles")),
    ("sparsity", "Sparsity by layer", ("density", "recall", "recall-heads", "stability", "layer-gradient")),
    ("coverage", "Coverage by distance", ("coverage-step", "coverage-run")),
    ("balance", "Load of ranks and ring steps", ("load-contiguous", "load-zigzag", "load-striped")),
    (
        "ring-section",
        "Ring",
        ("ring-forward", "ring-backward", "exposed", "worker-imbalance", "step-imbalance"),
    ),
    ("memory-section", "Memory", ("memory",)),
)


def write_report(
    folders: Sequence[Path], out: Path, figures: Path | None = None, refresh: int = 0
) -> list[Path]:
    """Compare runs on one page, `report.html` in the folder ``out``.

    Args:
        folders: run folders, or folders of evaluation results.
        figures: a folder for every chart as SVG and PDF; None for none.
        refresh: seconds after which the page loads itself again while a browser shows it; 0 for never.

    Returns:
        the files written, the page last.

    Raises:
        UserError: a folder that does not exist, no folder with anything to show, or vl-convert missing.
    """
    return _write(read_runs(folders), out, figures, refresh)


def _write(runs: Sequence[Run], out: Path, figures: Path | None = None, refresh: int = 0) -> list[Path]:
    charts = build_charts(runs)
    path = out / REPORT
    write_page(compare(runs, charts, refresh), path)
    written = write_figures(charts, figures) if figures is not None else []
    return [*written, path]


def watch_report(folders: Sequence[Path], out: Path, seconds: int, tell: Callable[[str], None]) -> None:
    """Write the report again every so many seconds, until no run goes on; the page loads itself again meanwhile."""
    while True:
        runs = read_runs(folders, empty=True)
        goes_on = any(run.state in ("running", "no step yet") for run in runs)
        (path,) = _write(runs, out, refresh=seconds if goes_on else 0)
        if not goes_on:
            tell(f"wrote {path}; no run goes on")
            return
        tell(f"wrote {path}")
        time.sleep(seconds)


def compare(runs: Sequence[Run], charts: Sequence[Chart], refresh: int = 0) -> str:
    """The page of some runs."""
    by_name = {chart.name: chart for chart in charts}
    trained = [run.name for run in runs if run.steps]
    sections = [Section("summary", "Summary", _summary(runs) + _what_ran(runs) + _missing(runs))]
    for name, title, holds in _SECTIONS:
        section = Section(name, title, charts=[by_name[one] for one in holds], three=name == "balance")
        sections.append(section)
        if name == "quality":
            heads, lines = score_table(runs)
            section.body = html_table(heads, lines, "Scores by task and length") if lines else ""
    sections.append(Section("options", "Options that differ", _options(runs)))
    sections.append(Section("environment", "Environment", _environment(runs)))
    title = ", ".join(run.name for run in runs[:4]) + (f" and {len(runs) - 4} more" if len(runs) > 4 else "")
    return page(
        f"Training runs: {title}",
        _lead(runs),
        sections,
        {name: colour_of(place) for place, name in enumerate(trained)},
        smooths=bool(trained),
        refresh=refresh,
    )


_WORDS = {
    "density": "share of all pairs of a token and an earlier one that is computed; 100 % is dense.",
    "recall": "share of dense attention's mass, its weights after softmax, that falls on what is computed.",
    "index": "what a head computes: slashes, which are distances between tokens, and columns, which are tokens that "
    "all later ones read.",
    "rank": "one process with one device. The ranks of a ring hold parts of the same sequence.",
    "ring step": "each rank attends to the keys of one other rank while the next ones are on their way to it.",
    "exposed wait": "time in which a rank has nothing to compute, for the next keys are not there yet.",
    "held-out loss": "loss on text that is not trained on.",
}


def _lead(runs: Sequence[Run]) -> str:
    """For a reader who was sent the page: what it is about, and its words."""
    made = datetime.now(tz=UTC).strftime("%Y-%m-%d %H:%M UTC")
    base = dense_run(runs)
    dense = (
        f"Losses are compared with {html.escape(base.name)}, which computes all of it."
        if base is not None
        else "No dense run, to compare losses with, is among these."
    )
    words = "".join(f"<dt>{word}</dt><dd>{html.escape(meaning)}</dd>" for word, meaning in _WORDS.items())
    return (
        "<p>Language models trained on long contexts with sparse attention, which computes a part of all pairs of "
        f'tokens. {dense}</p><p class="soft">Made by MTraining from the folders of the runs, {made}.</p>'
        f"<details><summary>Words on this page</summary><dl>{words}</dl></details>"
    )


def _what_ran(runs: Sequence[Run]) -> str:
    """What each run trained, and on what."""
    lines = []
    for run in runs:
        environment = run.about.get("environment")
        known_there = environment if isinstance(environment, dict) else {}
        if not run.config:
            continue
        cp, dp = run.option("parallel", "cp"), run.option("parallel", "dp")
        lines.append(
            [
                run.name,
                _model(run),
                _shown(run.option("train", "seq_len")),
                _shown(run.option("train", "batch_size")),
                "-" if cp is None else f"{_shown(dp or 1)} x {_shown(cp)}",
                run.option("layout", "name") or "-",
                known_there.get("device", "-"),
            ]
        )
    heads = ["run", "model", "tokens a sequence", "sequences a step", "rings x ranks", "layout", "device"]
    return html_table(heads, lines, "What ran", breaks=False) if lines else ""


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _model(run: Run) -> str:
    """The model's name, or the kind of a random one."""
    init, config = run.option("model", "init"), run.option("model", "config")
    if init == "random" and isinstance(config, dict):
        layers = config.get("num_hidden_layers")
        return f"random {config.get('model_type', 'model')}" + (f", {layers} layers" if layers else "")
    return str(init or "-").rstrip("/").split("/")[-1]


def _summary(runs: Sequence[Run]) -> str:
    base = dense_run(runs)
    heads = ["run", "state", "step", "left", "pattern", "loss", "to dense", "held-out loss", "tokens/s", "density",
             "recall", "ring waits"]  # fmt: skip
    lines = []
    for run in runs:
        losses = known(run.evaluations, "held_out_loss")
        left = run.seconds_left if run.state == "running" else None
        lines.append(
            [
                run.name,
                run.state,
                f"{run.done}/{run.planned}" if run.planned else str(run.done or "-"),
                "-" if left is None else duration(left),
                run.pattern or "-",
                _last(run, "loss", "{:.4f}"),
                _to_dense(run, base),
                f"{losses[-1]:.4f}" if losses else "-",
                _last(run, "tokens_per_second", "{:,.0f}"),
                _last(run, "density", "{:.1%}"),
                _last(run, "recall", "{:.1%}"),
                _last(run, "ring_exposed_fraction", "{:.1%}"),
            ]
        )
    return html_table(heads, lines, "The last value of each run", breaks=False)


def _last(run: Run, name: str, shown: str) -> str:
    values = known(run.steps, name)
    return shown.format(values[-1]) if values else "-"


def _to_dense(run: Run, base: Run | None) -> str:
    """Mean difference of loss over the last tenth of the steps that both have."""
    if base is None or run is base:
        return "-"
    found = [less for _, less in differences(run.steps, base.steps, "loss")]
    last = found[-max(1, len(found) // 10) :]
    return f"{sum(last) / len(last):+.4f}" if last else "-"


def _missing(runs: Sequence[Run]) -> str:
    lines = [[run.name, "; ".join(run.missing)] for run in runs if run.missing]
    return html_table(["run", "missing"], lines, "What the folders lack") if lines else ""


def _flat(options: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(options, dict) or not options:
        return {prefix.rstrip("."): str(options)} if prefix else {}
    return {
        key: value for name, part in options.items() for key, value in _flat(part, f"{prefix}{name}.").items()
    }


def _side_by_side(facts: Sequence[dict[str, str]]) -> list[list[str]]:
    """A line for each fact, a cell for each run."""
    keys = dict.fromkeys(key for one in facts for key in one)
    return [[key, *(one.get(key, "-") for one in facts)] for key in keys]


def _options(runs: Sequence[Run]) -> str:
    known_runs = [run for run in runs if run.config]
    if not known_runs:
        return "<p class='soft'>No run has a configuration that can be read.</p>"
    names = [run.name for run in known_runs]
    lines = _side_by_side([_flat(run.config) for run in known_runs])
    if len(names) > 1:
        lines = [line for line in lines if len(set(line[1:])) > 1]
    if not lines:
        return "<p>All options are the same.</p>"
    return html_table(
        ["option", *names], lines, "Options" if len(names) == 1 else "Options that differ between runs"
    )


def _start(start: Any) -> dict[str, str]:
    """What about.json says of a run's start, in words."""
    if not isinstance(start, dict) or not isinstance(start.get("seconds"), dict):
        return {}
    parts = {name: seconds for name, raw in start["seconds"].items() if (seconds := number(raw)) is not None}
    shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    compiled, loaded = (
        [start.get(f"{kind}_{how}", "-") for kind in ("kernels", "graphs")]
        for how in ("compiled", "from_cache")
    )
    return {
        "start": f"{sum(parts.values()):.1f} s to the end of the first step ({shown})",
        "compiled at the start": "{} kernels and {} graphs; from the cache {} and {}".format(
            *compiled, *loaded
        ),
    }


def _environment(runs: Sequence[Run]) -> str:
    facts = {run.name: (run.about.get("environment"), run.about.get("start")) for run in runs}
    shown = {
        name: _flat(fact) | _start(start) for name, (fact, start) in facts.items() if isinstance(fact, dict)
    }
    if not shown:
        return "<p class='soft'>No run has written down its environment.</p>"
    return html_table(["", *shown], _side_by_side(list(shown.values())), "Versions, devices and start")
