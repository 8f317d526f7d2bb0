"""The page in a real browser: every chart has data, nothing complains, and controls do what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser import Visit, needs_browser, visit
from run_folders import add_results, make_run

from mtraining.report import write_report
from mtraining.report.charts import build_charts
from mtraining.report.runs import read_runs

pytestmark = [needs_browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("runs")
    sparse = make_run(base / "sparse", steps=8)
    add_results(sparse / "evaluation")
    empty = base / "empty"
    empty.mkdir()
    return [
        sparse,
        make_run(base / "dense", "dense"),
        make_run(base / "other", steps=700, planned=900),
        empty,
    ]


@pytest.fixture(scope="module")
def page(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(folders, tmp_path_factory.mktemp("page"))[-1]


@pytest.fixture(scope="module")
def visited(page: Path) -> Visit:
    return visit(page)


def rows_of(visited: Visit, name: str) -> int:
    found = re.search(r'data-rows="(\d+)"', visited.figure(name))
    return int(found.group(1)) if found else 0


def test_every_chart_is_drawn_from_its_data_without_a_complaint(folders: list[Path], visited: Visit) -> None:
    assert visited.complaints == []
    charts = [chart for chart in build_charts(read_runs(folders)) if chart.tables]
    assert len(charts) == 23 and visited.of_body("drawn") == "23"
    for chart in charts:
        assert rows_of(visited, chart.name) == len(chart.rows()) > 0, chart.name
        figure = visited.figure(chart.name)
        assert re.search(r"mark-(line|rect)", figure) and re.search(r'<path[^>]* d="M', figure), chart.name


def test_readers_and_keys_find_names(visited: Visit) -> None:
    for figure in re.findall(r"<figure.*?</figure>", visited.document, re.DOTALL):
        for named in re.findall(r'aria-(?:labelledby|describedby)="([^"]+)"', figure):
            assert f'id="{named}"' in figure
        assert re.search(r'<svg[^>]*role="[^"]*"|role="graphics-document"[^>]*aria-label="[^"]+"', figure)
    for control in re.findall(r"<(?:button|select|input)[^>]*>", visited.document):
        before = visited.document[: visited.document.index(control)]
        inside_label = before.rfind("<label") > before.rfind("</label>")
        assert "aria-label=" in control or inside_label, control
    assert 'tabindex="-1"' not in visited.document


def test_runs_are_hidden_smoothed_and_put_on_a_log_scale(page: Path, visited: Visit) -> None:
    does = """
      const tick = (box, on) => { box.checked = on; box.dispatchEvent(new Event("change")); };
      tick(document.querySelector('.bar input[value="other"]'), false);
      await pause();
      tick(document.querySelector("#loss input.log"), true);
      const slider = document.getElementById("smooth");
      slider.value = 90; slider.dispatchEvent(new Event("input")); slider.dispatchEvent(new Event("change"));
      await pause(); await pause();
      document.querySelector("#loss details").open = true;
      document.querySelector("#density select").value = "other";
      document.querySelector("#density select").dispatchEvent(new Event("change"));
      await pause();
      const svg = await paper(page.charts.find((chart) => chart.name === "loss"));
      document.body.dataset.svg = String(svg.startsWith("<svg") && svg.includes("dense"));
    """
    after = visit(page, does)
    assert (after.complaints, after.of_body("failed"), after.of_body("visited")) == ([], None, "yes")
    assert (rows_of(visited, "loss"), rows_of(after, "loss")) == (18 + 500, 18)
    assert rows_of(after, "density") > rows_of(visited, "density")
    assert after.of_body("svg") == "true"
    cells = re.findall(r"<td>([^<]*)</td>", after.figure("loss"))
    first, last = float(cells[2]), float(cells[7 * 3 + 2])
    # Eight steps of the run fall from 5 to 3; smoothed, the last is still far above.
    assert first == pytest.approx(5.07, abs=0.1) and 3.4 < last < 4.2


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(page: Path, width: int) -> None:
    does = "document.body.dataset.wide = String(document.documentElement.scrollWidth > window.innerWidth);"
    assert visit(page, does, width=width).of_body("wide") == "false"
