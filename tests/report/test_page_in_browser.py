"""The page in a real browser: every chart has data, nothing complains, and controls do what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Tab, needs_browser
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


@pytest.fixture
def tab(page: Path, browser: Browser) -> Iterator[Tab]:
    with browser.open(page) as opened:
        yield opened


def test_every_chart_is_drawn_from_its_data_without_a_complaint(folders: list[Path], tab: Tab) -> None:
    assert tab.complaints == []
    charts = [chart for chart in build_charts(read_runs(folders)) if chart.tables]
    assert len(charts) == 24 and tab.run("document.body.dataset.drawn") == "24"
    for chart in charts:
        assert tab.rows(chart.name) == len(chart.rows()) > 0, chart.name
        figure = tab.figure(chart.name)
        assert re.search(r"mark-(line|rect)", figure) and re.search(r'<path[^>]* d="M', figure), chart.name


def test_a_screen_reader_is_told_of_every_chart(folders: list[Path], tab: Tab) -> None:
    """The browser's own accessibility tree: what each chart says, what its axes are, and a name for every control."""
    told = tab.accessible()
    graphics = [name for role, name in told if role == "graphics-document"]
    for chart in build_charts(read_runs(folders)):
        if chart.tables:
            assert f"{chart.title}. {chart.says}" in graphics, chart.name
            assert ("figure", chart.title) in told, chart.name
            assert ("button", f"Save {chart.title} as SVG") in told
    for role in ("button", "combobox", "checkbox", "slider", "link", "region", "table"):
        names = [name for one, name in told if one == role]
        assert names and all(names), role
    for control in (("checkbox", "sparse"), ("slider", "smoothing"), ("checkbox", "log scale")):
        assert control in told
    axes = [name for role, name in told if role == "graphics-symbol" and "axis" in name]
    for title in ("step", "loss (nats a token)"):
        assert any(f"titled '{title}'" in name for name in axes), title


def test_all_controls_are_reached_and_worked_with_keys(tab: Tab) -> None:
    where = "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    tab.press("Tab")
    assert tab.run(where) == "Skip to the charts" and tab.run("document.activeElement.offsetLeft") >= 0
    tab.press("Enter")
    assert tab.run("location.hash") == "#main"
    seen = []
    for _ in range(200):
        tab.press("Tab")
        inside = tab.run("document.activeElement.closest('figure')?.id || document.activeElement.value || ''")
        outline = tab.run("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", tab.run(where)  # the focus can be seen
        seen.append((inside, tab.run("document.activeElement.tagName")))
        if inside == "load-striped":
            break
    for name in ("loss", "throughput", "density", "load-contiguous"):
        assert {(name, "BUTTON"), (name, "SUMMARY")} <= set(seen), name
    assert ("density", "SELECT") in seen and ("loss", "INPUT") in seen and ("sparse", "INPUT") in seen
    before = tab.rows("loss")
    tab.run("document.querySelector('.bar input[value=other]').focus()")
    tab.press(" ")
    assert before == 18 + 500
    tab.until("document.querySelector('#loss .plot').dataset.rows", "18")
    tab.run("document.querySelector('#loss summary').focus()")
    tab.press("Enter")
    tab.press("Tab")
    assert tab.run(where) == "Data of Training loss"
    tab.until("document.activeElement.querySelectorAll('tbody tr').length", 18)
    tab.run("document.querySelector('#density select').focus()")
    tab.press("ArrowDown")
    tab.until("document.querySelector('#density select').value", "other")


def test_runs_are_hidden_smoothed_and_put_on_a_log_scale(tab: Tab) -> None:
    (whole, cells) = (tab.rows("loss"), tab.rows("density"))
    svg = tab.do(
        """
        const tick = (box, on) => { box.checked = on; box.dispatchEvent(new Event("change")); };
        tick(document.querySelector('.bar input[value="other"]'), false);
        await drawn();
        tick(document.querySelector("#loss input.log"), true);
        const slider = document.getElementById("smooth");
        slider.value = 90; slider.dispatchEvent(new Event("input")); slider.dispatchEvent(new Event("change"));
        await drawn();
        document.querySelector("#loss details").open = true;
        document.querySelector("#density select").value = "other";
        document.querySelector("#density select").dispatchEvent(new Event("change"));
        await drawn();
        return await paper(page.charts.find((chart) => chart.name === "loss"));
        """
    )
    assert tab.complaints == []
    assert (whole, tab.rows("loss")) == (18 + 500, 18)
    assert tab.rows("density") > cells
    assert svg.startswith("<svg") and "dense" in svg
    told = re.findall(r"<td>([^<]*)</td>", tab.figure("loss"))
    first, last = float(told[2]), float(told[7 * 3 + 2])
    # Eight steps of the run fall from 5 to 3; smoothed, the last is still far above.
    assert first == pytest.approx(5.07, abs=0.1) and 3.4 < last < 4.2


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(page: Path, browser: Browser, width: int) -> None:
    with browser.open(page, width=width) as tab:
        assert tab.run("document.documentElement.scrollWidth") <= width


def test_on_paper_charts_are_light_and_sized_for_it(page: Path, browser: Browser, tmp_path: Path) -> None:
    """Also for a reader in the dark: black text, no controls, a chart for each column, and what a menu has chosen."""
    with browser.open(page, scheme="dark") as tab:
        size = "[document.querySelector('#loss svg').clientWidth, document.querySelector('#loss svg').clientHeight]"
        on_screen = tab.run(size)
        tab.run("window.addEventListener('afterprint', () => { document.body.dataset.printed = 'yes'; })")
        assert tab.printed(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
        tab.until("document.body.dataset.printed", "yes")
        tab.do("await drawn();")
        assert tab.run(size) == on_screen  # as before, once it is printed
        tab.run("window.dispatchEvent(new Event('beforeprint'))")
        tab.send("Emulation.setEmulatedMedia", media="print")
        style = "getComputedStyle(document.querySelector('{}')).{}"
        assert tab.run(style.format("#loss .plot svg text", "fill")) == "rgb(0, 0, 0)"
        assert tab.run(style.format("figure", "backgroundColor")) == "rgb(255, 255, 255)"
        for gone in (".tools", ".skip", "nav", "figure details", ".bar input"):
            assert tab.run(style.format(gone, "display")) == "none", gone
        assert tab.run("document.querySelector('#density .chosen').innerText").startswith(
            "run: sparse (1 more"
        )
        widths = tab.run("[...document.querySelectorAll('.plot svg')].map((svg) => svg.clientWidth)")
        assert len(widths) == 24 and all(100 < width <= 670 for width in widths)
        assert tab.run("document.querySelector('#loss .plot svg').clientWidth") <= 340
        assert tab.complaints == []


def test_one_chart_is_printed_alone(tab: Tab) -> None:
    tab.run("window.print = () => { document.body.dataset.asked = 'yes'; }")
    tab.run("document.querySelector('#density button.pdf').click()")
    assert tab.run("document.body.dataset.asked") == "yes"
    tab.send("Emulation.setEmulatedMedia", media="print")
    shown = "[...document.querySelectorAll('figure, h1, h2, table')].filter((x) => x.offsetHeight > 0).map((x) => x.id)"
    assert tab.run(shown) == ["density"]
    tab.run("window.dispatchEvent(new Event('afterprint'))")
    assert len(tab.run(shown)) > 24
