"""The same picture is the same file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtraining.evaluate.svg import write_svg


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")

    def drawn(name: str) -> bytes:
        figure = figures.Figure(figsize=(2, 2))
        axes = figure.subplots()
        axes.plot([0, 1], [1, 0], marker="o", label="one")
        axes.legend()
        write_svg(figure, tmp_path / "new" / name)
        return (tmp_path / "new" / name).read_bytes()

    assert drawn("one.svg") == drawn("two.svg")
