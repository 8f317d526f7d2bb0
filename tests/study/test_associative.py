"""Associative recall: every question has one earlier pair that tells its answer, at any distance."""

import numpy as np
import pytest


def test_every_answer_stands_in_one_earlier_pair() -> None:
    from associative import KEYS, PAIR, VALUES, answers, sequence

    tokens = sequence(2048, questions=40, pairs=30, seed=(0, 5)).tolist()
    assert len(tokens) == 2049
    found = answers(tokens)
    assert len(found) == 40
    pairs = [tuple(tokens[at + 1 : at + 3]) for at in range(0, 2048, 4) if tokens[at] == PAIR]
    assert len(pairs) == len(set(pairs)) == 70
    for answer in found:
        told = answer.position - answer.distance
        assert answer.distance > 0
        assert tokens[told - 3] == PAIR
        assert tokens[told] == tokens[answer.position] >= VALUES
        assert tokens[told - 2 : told] == tokens[answer.position - 2 : answer.position]
        assert all(KEYS <= token < VALUES for token in tokens[told - 2 : told])


def test_sequences_depend_on_their_seed_alone() -> None:
    from associative import sequence

    assert (sequence(512, 8, 8, (0, 1)) == sequence(512, 8, 8, (0, 1))).all()
    assert (sequence(512, 8, 8, (0, 1)) != sequence(512, 8, 8, (1, 1))).any()


def test_distances_are_uniform_up_to_the_question() -> None:
    from associative import answers, sequence

    shares = [
        answer.distance / answer.position
        for number in range(40)
        for answer in answers(sequence(2048, 16, 16, (0, number)).tolist())
    ]
    counts = np.histogram(shares, bins=4, range=(0, 1))[0] / len(shares)
    assert counts == pytest.approx([0.25] * 4, abs=0.06)
