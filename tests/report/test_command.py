"""The commands of the page about reports, on runs that were trained."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, needs_browser

from mtraining.cli import main
from mtraining.data import PrepareOptions, prepare
from mtraining.train.config import parse_config
from mtraining.train.loop import train

MODEL = {
    "model_type": "qwen2", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192,
}  # fmt: skip

SPARSE = {
    "name": "vertical_slash", "block_size": 16, "top_p": 0.3, "max_columns": 16, "slash_by": "block",
    "slash_density": 0.1, "window": 8, "sinks": 4, "probe": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with book.txt, a sparse and a dense run."""
    base = tmp_path_factory.mktemp("work")
    text = " ".join(f"{number} and {number * number}," for number in range(2000))
    (base / "book.txt").write_text(text)
    prepare(PrepareOptions(sources=(str(base / "book.txt"),), out=base / "data", kind="text"), progress=False)
    for name, pattern in (
        ("sparse", SPARSE),
        ("dense", {"name": "dense", "block_size": 16}),
    ):
        config: dict[str, Any] = {
            "output": str(base / "runs" / name), "model": {"init": "random", "config": MODEL},
            "data": {"path": str(base / "data")}, "pattern": pattern, "train": {"seq_len": 512, "steps": 2},
            "layout": {"name": "zigzag"}, "checkpoint": {"export": False},
            "log": {"every": 1, "recall_rows": 8, "trackers": []}, "distributed": {"device": "cpu"},
        }  # fmt: skip
        train(parse_config(config))
    return base


def run(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line in ``folder``."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0


def charts(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return {chart["name"]: chart for chart in json.loads(found.group(1))["charts"]}


def test_the_report_of_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("mtraining report runs/sparse runs/dense", folder, monkeypatch)
    page = folder / "runs/sparse/report/report.html"
    found = charts(page)
    assert set(found["loss"]["tables"]) == {"sparse", "dense"}
    assert list(found["loss-difference"]["tables"]) == ["sparse"]
    wanted = {
        "density",
        "recall",
        "recall-heads",
        "stability",
        "layer-gradient",
        "coverage-step",
        "coverage-run",
    }
    assert wanted <= set(found) and {"memory", "load-contiguous", "load-zigzag"} <= set(found)
    assert "finished" in page.read_text()


@pytest.mark.slow
def test_the_inspection_of_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("mtraining inspect runs/sparse book.txt --tokens 8192", folder, monkeypatch)
    page = folder / "attention.html"
    assert len(charts(page)["map"]["tables"]) == 4 and "<mark>" in page.read_text()
    assert page.stat().st_size < 5_000_000


@needs_browser
@pytest.mark.slow
@pytest.mark.xdist_group("browser")
def test_an_inspection_in_a_browser(
    folder: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "attention.html"
    run(f"mtraining inspect runs/sparse book.txt --tokens 1024 --rows 16 --out {out}", folder, monkeypatch)
    with browser.open(out, width=390) as tab:
        assert tab.complaints == [] and tab.run("document.body.dataset.drawn") == "5"
        assert tab.rows("map") > 0 and tab.run("document.documentElement.scrollWidth") == 390
