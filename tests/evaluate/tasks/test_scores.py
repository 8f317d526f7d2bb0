"""Scores at their edges."""

from __future__ import annotations

import pytest

from mtraining.evaluate.tasks import metrics
from mtraining.evaluate.tasks.base import Score


@pytest.mark.parametrize(
    "score, prediction, references, expected",
    [
        (metrics.all_contained, " 1234567 and 7654321.", ("1234567", "7654321"), 1.0),
        (metrics.all_contained, "1234567", ("1234567", "7654321"), 0.5),
        (metrics.all_contained, "BLUE-Sky", ("blue-sky",), 1.0),
        (metrics.all_contained, "", ("x",), 0.0),
        (metrics.all_contained, "a\x00b", ("ab",), 0.0),  # a control character is a break, not nothing
        (metrics.any_contained, "It was Paris", ("london", "paris"), 1.0),
        (metrics.any_contained, "It was Rome", ("london", "paris"), 0.0),
        (metrics.first_number, " is 71432. Remember 11111", ("71432",), 1.0),
        (metrics.first_number, " 714 32", ("71432",), 0.0),
        (metrics.first_number, "007", ("7",), 0.0),  # digits, not values
        (metrics.first_number, "none", ("7",), 0.0),
        (metrics.first_value, " 07.", ("7",), 1.0),
        (metrics.first_value, "7.0 or 8", ("7",), 1.0),
        (metrics.first_value, "7.5", ("7",), 0.0),
        (metrics.first_value, "", ("7",), 0.0),
        (metrics.word_present, '"ab-cd": "ef-01"}', ("ef-01",), 1.0),
        (metrics.word_present, "ef-012", ("ef-01",), 0.0),
        (metrics.name_present, "it is  kate!", ("KATE",), 1.0),
        (metrics.name_present, "kateline", ("KATE",), 0.0),
        (metrics.last_integer, "The value is -7.", ("-7",), 1.0),
        (metrics.last_integer, "7 apples", ("7",), 0.0),
        (metrics.last_integer, "", ("7",), 0.0),
        (metrics.running_values, "5, 7, 9, 4", ("5", "7", "8", "4"), 0.5),
        (metrics.running_values, "5, 7", ("5", "7", "8", "4"), 0.5),
        (metrics.running_values, "x", ("5",), 0.0),
        (metrics.option_chosen, "B", ("B", "the cat"), 1.0),
        (metrics.option_chosen, " B. A was tempting", ("B", "the cat"), 1.0),  # the first letter counts
        (metrics.option_chosen, "A. B was tempting", ("B", "the cat"), 0.0),
        (metrics.option_chosen, "Bob", ("B", "the cat"), 1.0),  # as published: a letter, whatever follows
        (metrics.option_chosen, "I think B, not A", ("B", "the cat"), 1.0),
        (metrics.option_chosen, "I think A, no: B", ("B", "the cat"), 0.0),
        (metrics.option_chosen, "The answer is: B", ("B", "the cat"), 1.0),
        (metrics.option_chosen, "The option is A, not B", ("B", "the cat"), 0.0),
        (metrics.option_chosen, "none of them", ("B", "the cat"), 0.0),
        (metrics.option_chosen, "the cat", ("B", "the cat"), 1.0),
        (metrics.option_chosen, "the answer is: the cat", ("B", "the cat"), 1.0),
        (metrics.option_chosen, "the answer is: the dog", ("B", "the cat"), 0.0),
        (metrics.option_chosen, "", ("B", "the cat"), 0.0),
        (metrics.bug_named, "J", ("J", "parse"), 1.0),
        (metrics.bug_named, " B. parse", ("B", "parse"), 1.0),
        (metrics.bug_named, "B: it", ("B", "parse"), 1.0),
        (metrics.bug_named, "Option B", ("B", "parse"), 1.0),
        (metrics.bug_named, "Because", ("B", "parse"), 0.0),  # no letter of its own
        (metrics.bug_named, "parser", ("B", "parse"), 0.0),
        (metrics.bug_named, "A. render, not B", ("B", "parse"), 0.0),  # the first one counts
        (metrics.bug_named, "My answer is: B", ("B", "parse"), 1.0),
        (metrics.bug_named, "My answer is: A or B", ("B", "parse"), 0.0),
        (metrics.bug_named, "", ("B", "parse"), 0.0),
        (metrics.bug_named, "parse is wrong", ("J", "parse"), 1.0),
        (metrics.bug_named, "The correct option is: parse", ("J", "parse"), 1.0),
        (metrics.bug_named, "`render`", ("J", "parse"), 0.0),
        (metrics.token_f1, "The cat, sat", ("a cat sat!",), 1.0),
        (metrics.token_f1, "cat", ("cat sat", "dog"), pytest.approx(2 / 3)),
        (metrics.token_f1, "", ("cat",), 0.0),
        (
            metrics.token_f1,
            "cat cat",
            ("cat",),
            pytest.approx(2 / 3),
        ),  # a word counts as often as it is there
        (metrics.character_f1, "红 楼梦。", ("红楼梦",), 1.0),
        (metrics.character_f1, "红楼", ("红楼梦",), pytest.approx(0.8)),
        (metrics.character_f1, "贾宝玉", ("宝玉", "贾宝玉"), 1.0),
    ],
)
def test_scores(score: Score, prediction: str, references: tuple[str, ...], expected: float) -> None:
    assert score(prediction, references) == expected


def test_rouge() -> None:
    assert metrics.rouge_lsum("the cat sat", ["a dog", "the cat sat"]) == 1.0
    assert 0 < metrics.rouge_lsum("the cat\nran home", ["the cat sat\nhome it ran"]) < 1
