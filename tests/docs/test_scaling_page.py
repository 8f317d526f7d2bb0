"""The table of scaling.md says what the simulation says."""

import re

import pytest

from docs_pages import ROOT
from mtraining.report.ring_scaling import INTER, layer_on, lowest_rate, table

PAGE = ROOT / "docs" / "scaling.md"
LARGE = (64, 128, 256, 1024)


def lines(ranks: tuple[int, ...]) -> list[str]:
    return [
        f"| {n} | {flat:.1f}, {100 * waits:.0f} % | {nested:.1f}, {100 * fewer:.0f} % |"
        for n, flat, waits, nested, fewer in table(ranks)
    ]


def test_small_clusters() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [line for line in lines((8, 16, 32)) if line not in page] == []


@pytest.mark.slow
def test_large_clusters() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [line for line in lines(LARGE) if line not in page] == []
    free = [layer_on(n, True, 1e15).milliseconds for n in (256, 1024)]
    assert f"256 GPUs would still take {free[0]:.1f} ms and 1,024 would take {free[1]:.1f}." in page
    lowest = [lowest_rate(32, nested) / 1e9 for nested in (False, True)]
    assert re.search(rf"carry\s+{lowest[0]:.0f}\s+GB/s", page) and re.search(
        rf"{lowest[1]:.0f}\s+GB/s\s+would", page
    )
    slow = [layer_on(n, True, INTER, 1.2).milliseconds / layer_on(n, True).milliseconds for n in (32, 256)]
    assert slow[0] == pytest.approx(1.2, abs=0.005) and slow[1] == pytest.approx(1.04, abs=0.005)
