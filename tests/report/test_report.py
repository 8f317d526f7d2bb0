"""Charts hold what run folders say, and a report says what is missing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import vl_convert
from run_folders import HEADS, LAYERS, RANKS, add_results, evaluation, make_run, step_record

from mtraining.errors import UserError
from mtraining.report import watch_report, write_report
from mtraining.report.chart import Chart
from mtraining.report.charts import build_charts
from mtraining.report.figures import filled
from mtraining.report.runs import read_run, read_runs
from mtraining.report.series import bucketed, difference, heat


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "sparse", steps=8)
    add_results(folder / "evaluation")
    return folder


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_run(tmp_path / "dense", "dense")


def charts_of(*folders: Path) -> dict[str, Chart]:
    return {chart.name: chart for chart in build_charts(read_runs(folders))}


def packed(page: Path) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL
    )
    assert found is not None
    return json.loads(found.group(1))


def write(folder: Path, records: list[Any]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_curves_are_the_records_of_the_runs(sparse: Path, dense: Path) -> None:
    charts = charts_of(sparse, dense)
    loss = charts["loss"].tables
    assert loss["sparse"]["step"] == list(range(1, 9)) and len(loss["dense"]["step"]) == 10
    for place, step in enumerate(loss["sparse"]["step"]):
        record = step_record(step, "vertical_slash")
        assert loss["sparse"]["value"][place] == pytest.approx(record["loss"], rel=1e-4)
        assert charts["throughput"].tables["sparse"]["value"][place] == pytest.approx(
            record["tokens_per_second"], rel=1e-4
        )
    to_dense = charts["loss-difference"].tables
    assert list(to_dense) == ["sparse"]
    assert to_dense["sparse"]["value"] == pytest.approx([0.02] * 8)


def test_grids_have_a_value_for_each_layer_and_head(sparse: Path, dense: Path) -> None:
    charts = charts_of(sparse, dense)
    density = charts["density"].tables["sparse"]
    assert density["x"] == [1, 2, 4, 6, 8] and len(density["z"]) == LAYERS
    assert density["z"][2][0] == pytest.approx(100 * step_record(2, "x")["layer_density"][2], rel=1e-4)
    heads = charts["recall-heads"].tables["sparse"]
    assert (len(heads["y"]), len(heads["x"])) == (LAYERS, HEADS)
    assert heads["z"][1][3] == pytest.approx(100 * (0.99 - 0.06 - 0.03))
    assert charts["density"].missing == ["dense: not measured"]


def test_loads_rings_coverage_and_memory(sparse: Path) -> None:
    charts = charts_of(sparse)
    load = charts["load-striped"].tables["sparse"]["z"]
    assert len(load) == RANKS and sum(map(sum, load)) == pytest.approx(RANKS**2)
    assert load[3][1] / load[0][0] == pytest.approx(5)
    for phase, seconds in (("forward", 1), ("backward", 2)):
        parts = charts[f"ring-{phase}"].tables["sparse"]["parts"]
        assert [part["rank"] for part in parts[::2]] == [f"rank {rank}" for rank in range(RANKS)]
        for rank, (computing, waiting) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
            assert (computing["what"], waiting["what"]) == ("computing", "waiting for transfers")
            assert computing["end"] == waiting["start"] and computing["start"] == [0, *waiting["end"][:-1]]
            assert waiting["end"][-1] == pytest.approx(RANKS * (seconds * (1 + rank) + 0.5))
    bands = {part["kind"]: part["value"][-1] for part in charts["coverage-run"].tables["sparse"]["parts"]}
    assert bands == {"< 1K": 0, "1K to 4K": 0, "4K to 32K": 10, "> 32K": 30}
    memory = charts["memory"].tables["sparse"]
    assert memory == {"kind": ["predicted for a GPU", "measured on a GPU"], "value": [2.9, 3.0]}


def test_without_ranks_the_ring_has_their_mean(sparse: Path) -> None:
    (sparse / "ring.json").write_text(json.dumps({"ranks": [0], "forward": {"compute": [["a"]]}}))
    computing, waiting = charts_of(sparse)["ring-forward"].tables["sparse"]["parts"]
    assert computing["rank"] == waiting["rank"] == "mean of ranks"
    assert computing["end"][:2] == pytest.approx([4, 9]) and waiting["end"][:2] == pytest.approx([5, 10])


def test_bands_beyond_the_sequence_are_left_out(sparse: Path) -> None:
    """No query is 32K tokens from a key there, which is no coverage."""
    text = (sparse / "config.yaml").read_text()
    (sparse / "config.yaml").write_text(text.replace("seq_len: 65536", "seq_len: 32768"))
    chart = charts_of(sparse)["coverage-step"]
    assert [part["kind"] for part in chart.tables["sparse"]["parts"]] == ["< 1K", "1K to 4K", "4K to 32K"]
    assert "> 32K" not in json.dumps(chart.spec)


def test_colours_of_percentages_span_five_points_at_least(sparse: Path) -> None:
    """Or a run whose density never moves would look as if it did. A dense run beside it changes nothing."""
    density = charts_of(sparse)["density"]
    low, high = density.tables["sparse"]["domain"]
    values = [value for line in density.tables["sparse"]["z"] for value in line]
    assert low <= min(values) and high >= max(values)
    write(sparse, [step_record(2, "x") | {"layer_density": [0.205, 0.2051]}])
    table = charts_of(sparse)["density"].tables["sparse"]
    assert table["domain"] == pytest.approx([18, 23], abs=0.1)
    write(sparse, [step_record(2, "x") | {"layer_density": [1.0, 1.0]}])
    chart = charts_of(sparse)["density"]
    assert chart.tables["sparse"]["domain"] == [95, 100]
    assert filled(chart)["encoding"]["color"]["scale"]["domain"] == [95, 100]


def test_the_page_says_what_ran_and_what_its_words_mean(sparse: Path, dense: Path, tmp_path: Path) -> None:
    (page,) = write_report([sparse, dense], tmp_path / "out")
    text = page.read_text()
    assert (
        "<h1>Training runs: sparse, dense</h1>" in text and "compared with dense, which computes all" in text
    )
    assert "<dt>recall</dt>" in text
    assert "<td>Qwen2.5-3B</td><td>65,536</td><td>4</td><td>1 x 4</td>" in text
    (page,) = write_report([sparse], tmp_path / "out")
    assert "No dense run" in page.read_text()


def test_evaluations_of_training_and_of_the_command(sparse: Path) -> None:
    charts = charts_of(sparse)
    held = {part["kind"]: part for part in charts["held-out"].tables["sparse"]["parts"]}
    assert set(held) == {f"{a}, {n} tokens" for a in ("train", "dense") for n in ("1K", "4K")}
    assert held["train, 4K tokens"]["step"] == [0, 4, 8]
    assert held["train, 4K tokens"]["value"] == pytest.approx([5.4096, 4.9096, 4.4096], rel=1e-4)
    position = charts["by-position"].tables["sparse"]["parts"][1]
    assert position["position"] == [512, 1536, 2560, 3584]
    assert position["value"] == evaluation(8, 4.0)["held_out"][1]["by_position"]
    needles = charts["needles"].tables["sparse: small, train, needle_words"]
    assert needles == {"x": ["1K", "4K"], "y": ["0%", "50%", "100%"], "z": [[100, 100], [0, 0], [0, 0]]}


def test_every_chart_draws_on_paper(sparse: Path, dense: Path) -> None:
    drawn = [chart for chart in charts_of(sparse, dense).values() if chart.tables]
    assert len(drawn) == 24
    for chart in drawn:
        svg = vl_convert.vegalite_to_svg(filled(chart))
        assert re.search(r'mark-(line|rect).*?<path[^>]* d="M', svg, re.DOTALL), chart.name


def test_a_long_curve_keeps_its_extremes() -> None:
    values = [0.0] * 10_000
    values[4321], values[4322] = 50.0, -50.0
    columns = bucketed(range(1, 10_001), values, 100)
    assert len(columns["step"]) == 100 and columns["step"][-1] == 10_000
    assert max(columns["high"]) == 50 and min(columns["low"]) == -50
    assert sum(columns["value"]) == 0
    assert "low" not in bucketed([1, 2], [1.0, 2.0], 2)


def test_differences_are_of_equal_steps() -> None:
    mine = [{"step": step, "loss": 2.0 * step} for step in (2, 3, 4)]
    base = [{"step": step, "loss": 1.0 * step} for step in (1, 2, 4)]
    assert difference(mine, base, "loss", 10) == {"step": [2, 4], "value": [2.0, 4.0]}


def test_heat_averages_buckets_of_records() -> None:
    records = [{"step": step, "v": [step, None if step < 3 else 1]} for step in (1, 2, 3, 4)]
    assert heat(records, "v", 2) == {"x": [0, 2, 4], "y": [0, 1], "z": [[1.5, 3.5], [None, 1]]}
    assert heat([{"step": 1}], "v", 2) == {}


def test_the_page_needs_nothing_else_and_holds_every_table(sparse: Path, dense: Path, tmp_path: Path) -> None:
    (page,) = write_report([sparse, dense], tmp_path / "out")
    text = page.read_text()
    outside = re.findall(r"""(?:src|href)=["'](?!#)[^"']*["']""", text.partition("<script>")[0])
    assert outside == []
    data = packed(page)
    assert len(data["charts"]) == 24 and all(chart["tables"] for chart in data["charts"])
    assert "train.lr" not in text.partition("Options that differ")[0]
    assert '<th scope="row">pattern.name</th><td>vertical_slash</td><td>dense</td>' in text
    assert "26.5 s to the end of the first step (imports 6.0, first step 20.5)" in text
    assert "23 kernels and 0 graphs; from the cache - and -" in text
    assert "H100" in text and "+0.0200" in text and "needle_words" in text


def test_what_never_changes_has_an_axis(sparse: Path) -> None:
    """1.2 all along: the axis begins at 1, which is even. It would have one tick, 1, at 1.2 otherwise."""
    svg = vl_convert.vegalite_to_svg(filled(charts_of(sparse)["worker-imbalance"]))
    assert {"1.00", "1.20"} <= set(re.findall(r">([\d.]+)</text>", svg))


def test_legends_can_be_seen_where_bands_are(tmp_path: Path) -> None:
    """A band is faint, and the symbols of a legend are not."""
    runs = [make_run(tmp_path / name, steps=7000) for name in ("a", "b")]
    svg = vl_convert.vegalite_to_svg(filled(charts_of(*runs)["loss"]))
    legend = svg[svg.index("role-legend-entry") :]
    shown = re.findall(
        r'class="mark-symbol role-legend-symbol.*?</path>|<path[^>]*stroke="#0072B2"[^>]*>', legend
    )
    assert shown and 'opacity="0.18"' not in legend


def test_figures_are_vector_files(sparse: Path, tmp_path: Path) -> None:
    written = write_report([sparse], tmp_path / "out", tmp_path / "figures")
    assert {path.suffix for path in written[:-1]} == {".svg", ".pdf"}
    assert (tmp_path / "figures/loss.pdf").read_bytes().startswith(b"%PDF")


def test_a_killed_run_shows_what_it_has(sparse: Path) -> None:
    with open(sparse / "metrics.jsonl", "a") as file:
        file.write(json.dumps(step_record(8, "vertical_slash") | {"loss": 9.0}) + '\n{"step": 9, "lo')
    (sparse / "balance.json").write_text("{")
    (sparse / "about.json").unlink()
    run = read_run(sparse, "sparse")
    assert [record["step"] for record in run.steps] == list(range(1, 9)) and run.steps[-1]["loss"] == 9.0
    told = "; ".join(run.missing)
    assert "1 of 13 lines" in told and "1 records were written again" in told
    assert "balance.json cannot be read" in told and "no about.json" in told
    charts = charts_of(sparse)
    assert charts["loss"].tables and charts["load-zigzag"].missing == ["measured in no run"]


def test_values_that_are_no_numbers_are_left_out(sparse: Path, tmp_path: Path) -> None:
    broken = [
        {"step": 1, "loss": float("nan"), "layer_density": "x", "ring_forward_compute": 3, "memory": True},
        {"step": 2, "loss": 1.5, "layer_density": [None, "a", 0.5], "uncovered_by_distance": [1]},
        {"step": "<script>alert(1)</script>", "loss": 1.0}, [], {"loss": 1},
        {"step": 2, "evaluation": "x", "held_out": [1, {"loss": "a"}], "suites": 3},
    ]  # fmt: skip
    write(sparse, broken)
    (sparse / "config.yaml").write_text("- a list\n")
    (sparse / "balance.json").write_text(
        json.dumps({"layouts": [{"layout": "zigzag", "load": [[1], [1, 2]]}, 3]})
    )
    (page,) = write_report([sparse], tmp_path / "out")
    loss = next(chart for chart in packed(page)["charts"] if chart["name"] == "loss")
    assert loss["tables"] == {"sparse": {"step": [2], "value": [1.5]}}
    assert "alert(1)" not in page.read_text()
    assert "3 of 6 lines" in page.read_text() and "1 steps have no finite loss" in page.read_text()


def test_names_are_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a<script>alert(1)<")
    (page,) = write_report([folder], tmp_path / "out")
    assert "<script>alert" not in page.read_text() and "a&lt;script&gt;" in page.read_text()
    assert list(packed(page)["charts"][0]["tables"]) == ["a<script>alert(1)<"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a/run"), make_run(tmp_path / "b/run")])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    with pytest.raises(UserError, match="a run is named twice"):
        read_runs([tmp_path / "a/run", tmp_path / "a/run"])


def test_folders_without_anything_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        write_report([tmp_path / "none"], tmp_path / "out")
    with pytest.raises(UserError, match="holds neither"):
        write_report([tmp_path], tmp_path / "out")


def test_watching_ends_with_the_runs(sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    waited: list[float] = []

    def one_step_more(seconds: float) -> None:
        waited.append(seconds)
        assert packed(tmp_path / "out/report.html")["refresh"] == 3
        records = [step_record(step, "vertical_slash") for step in range(1, 9 + len(waited))]
        write(sparse, records)

    monkeypatch.setattr("time.sleep", one_step_more)
    watch_report([sparse], tmp_path / "out", 3, told.append)
    assert waited == [3, 3] and told[-1].endswith("no run goes on")
    assert packed(tmp_path / "out/report.html")["refresh"] == 0


def test_watching_waits_for_a_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And shows what there is: here the options, and the memory that was predicted."""
    run = make_run(tmp_path / "run")
    later = {name: (run / name).read_text() for name in ("metrics.jsonl", "balance.json", "ring.json")}
    for name in later:
        (run / name).unlink()
    with pytest.raises(UserError, match="--watch to wait for a first step"):
        write_report([run], tmp_path / "out")
    told: list[str] = []

    def begin(seconds: float) -> None:
        page = tmp_path / "out/report.html"
        assert packed(page)["refresh"] == 5 and "no step yet" in page.read_text()
        assert [chart["name"] for chart in packed(page)["charts"]] == ["memory"]
        for name, text in later.items():
            (run / name).write_text(text)

    monkeypatch.setattr("time.sleep", begin)
    watch_report([run], tmp_path / "out", 5, told.append)
    assert len(told) == 2 and len(packed(tmp_path / "out/report.html")["charts"]) > 15


@pytest.mark.slow
def test_twenty_long_runs_stay_under_five_megabytes(tmp_path: Path) -> None:
    """Each of 10,000 steps, of 36 layers with 16 heads on a ring of 32, with all that a step can log."""
    first = make_run(
        tmp_path / "run0", steps=10_000, planned=10_000, every=10, size=(36, 16, 32), evaluations=100
    )
    add_results(first / "evaluation")
    folders = [first]
    for number in range(1, 20):
        folders.append(tmp_path / f"run{number}")
        shutil.copytree(first, folders[-1])
    (page,) = write_report(folders, tmp_path / "out")
    assert page.stat().st_size < 5_000_000
    charts = {chart["name"]: chart for chart in packed(page)["charts"]}
    # All but the difference to a dense run, of which there is none.
    assert len(charts) == 23 and all(
        len(charts[name]["tables"]) == 20 for name in ("loss", "density", "ring-forward")
    )


def test_many_evaluations_are_thinned_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", steps=12, planned=12, evaluations=12)
    monkeypatch.setattr("mtraining.report.evaluated._POINTS", 20)  # 4 curves of 13 points
    chart = charts_of(run)["held-out"]
    assert [part["step"] for part in chart.tables["run"]["parts"]] == [[0, 3, 6, 9, 12]] * 4
    assert chart.missing == ["2 of 3 evaluations, for there are 52 points"]
