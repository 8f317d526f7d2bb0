"""Numbers with an exponent are numbers, and what is written reads back equal."""

import math
from typing import Any

import pytest

from mtraining.inputs.yaml_text import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e6", 1e6),
        ("1e-6", 1e-6),
        ("-2E+3", -2000.0),
        ("1.5e6", 1.5e6),
        (".5e1", 5.0),
        ("5.e1", 50.0),
        ("1.0e-6", 1e-6),
        ("0x1e6", 0x1E6),
        ("1e", "1e"),
        ("e6", "e6"),
        ("1e6b", "1e6b"),
        ("'1e6'", "1e6"),
        ("1.2.3e4", "1.2.3e4"),
    ],
)
def test_what_a_word_is_read_as(text: str, value: Any) -> None:
    found = read_yaml(f"a: {text}", "the text")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value", ["1e6", "1e-6", "2E3", "1.5e6", ".5e1", 1e6, 1e-6, 1e300, math.inf, "plain", None, 7]
)
def test_what_is_written_reads_back(value: Any) -> None:
    assert read_yaml(write_yaml({"a": [value]}), "the text") == {"a": [value]}
