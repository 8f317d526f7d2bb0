"""What is read from outside: YAML with numbers and keys as written, and sections whose mistakes are one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from mtraining.errors import UserError
from mtraining.inputs.sections import Section, read_section
from mtraining.inputs.yaml_text import read_yaml, write_yaml


class Options(Section):
    """A section as any other."""

    steps: int
    rate: float = 0.1


@pytest.mark.parametrize(
    "text, value", [("1e6", 1e6), ("-1E-6", -1e-6), ("'1e6'", "1e6"), ("1e", "1e"), ("", None)]
)
def test_numbers_are_numbers_and_quoted_text_is_text(text: str, value: Any) -> None:
    found = read_yaml(text, "here")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value", ["1e6", 1e6, {"b": 1, "a": ["1e-3", None]}, "yes"])
def test_what_is_written_is_read_back(value: Any) -> None:
    assert read_yaml(write_yaml(value), "here") == value


def test_a_key_in_two_places_is_named_with_its_lines() -> None:
    with pytest.raises(UserError, match=r"here: the key a\.b stands twice, in lines 2 and 3"):
        read_yaml("a:\n  b: 1\n  b: 2\n", "here")


@pytest.mark.parametrize(
    "raw, told",
    [
        ({"stepz": 1}, "unknown key stepz in here; did you mean steps?"),
        ({"rate": 1.0}, "here lacks the required key steps."),
    ],
)
def test_a_mistake_is_one_sentence(raw: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        read_section(Options, raw, "here")
    assert str(caught.value) == told
