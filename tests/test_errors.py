"""What sentences about bad input are made with."""

from __future__ import annotations

import pytest

from mtraining.errors import did_you_mean, first_line, nearest


def test_the_nearest_known_name() -> None:
    assert nearest("stripd", ["zigzag", "striped", "strips"]) == "striped"
    assert nearest("xyz", ["zigzag", "striped"]) is None
    assert nearest("xyz", {"zigzag": 1}, 0.0) == "zigzag"
    assert nearest("xyz", [], 0.0) is None


def test_the_question_is_asked_only_where_something_is_near() -> None:
    assert did_you_mean("stripd", ["striped"]) == " (did you mean 'striped'?)"
    assert did_you_mean("xyz", ["striped"]) == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [(ValueError("\n one\ntwo"), "one"), (ValueError(), "ValueError"), (ValueError("x" * 300), "x" * 200)],
)
def test_the_first_line_of_an_error(error: Exception, told: str) -> None:
    assert first_line(error) == told
