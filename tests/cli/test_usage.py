"""A command line that cannot be read is one sentence, as every other mistake is."""

from __future__ import annotations

import re
import sys

import pytest

from mtraining.cli import main


# Patterns: words of typer 0.29, or of 0.26.
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("prepare a b --workers 0",
         "--workers: (input should be greater than or equal to 1|0 is not in the range .*); mtraining prepare --help"),
        ("train x --nproc two", "--nproc: (input should be a valid integer|'two' is not a valid integer)"),
        ("prepare a b --worker 3", "no such option: --worker"),
        ("train", r"missing argument '(?i:config)'; mtraining train --help lists what it takes\."),
        ("train x --nproc", "option '--nproc' requires an argument"),
        ("trian x", "no such command 'trian'; did you mean 'train'; mtraining --help"),
        ("bench attention --warm-up x", "--warm-up: (input should be a valid number|'x' is not a valid float)"),
    ],
)  # fmt: skip
def test_one_sentence_without_a_box(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, sentence: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["mtraining", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == ""
    assert re.match(f"error: {sentence}", told.err), told.err
    assert len(told.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code"), [("--version", 0), ("train --help", 0), ("", 2), ("bench", 2)]
)
def test_help_is_still_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, code: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["mtraining", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr()
    assert stop.value.code == code
    assert "error:" not in told.err
    assert ("mtraining 0" if arguments == "--version" else "Usage: mtraining") in told.out + told.err
