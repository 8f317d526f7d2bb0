"""Associative recall: every question has one earlier pair that tells its answer, at any distance."""

from pathlib import Path

import numpy as np
import pytest

from mtraining.data import TokenShards
from mtraining.errors import UserError

CORPUS = {"documents": 3, "held_out": 2, "questions": 40, "pairs": 30, "keys": 80, "values": 4}


def test_every_answer_stands_in_one_earlier_pair() -> None:
    from associative import Vocabulary, answers, sequence

    words = Vocabulary.of(CORPUS)
    tokens = sequence(2048, CORPUS, (0, 5)).tolist()
    assert len(tokens) == 2049
    found = answers(tokens, words)
    assert len(found) == 40
    told = [token for token in tokens if words.told(token) is not None]
    assert len(told) == len({words.told(token) for token in told}) == 70
    for answer in found:
        question, value = tokens[answer.position - 1 : answer.position + 1]
        key = words.asked(question)
        assert answer.distance > 0 and key is not None
        pair = tokens[answer.position - 1 - answer.distance]
        assert pair == words.pair(key, value - words.value(0))


def test_tokens_stand_for_one_thing() -> None:
    from associative import Vocabulary

    words = Vocabulary(keys=3, values=2)
    ids = [0, 1, words.value(0), words.value(1), *map(words.question, range(3))]
    ids += [words.pair(key, value) for key in range(3) for value in range(2)]
    assert ids == list(range(len(words.words())))
    assert [words.asked(token) for token in ids] == [None] * 4 + [0, 1, 2] + [None] * 6
    assert [words.told(token) for token in ids] == [None] * 7 + [0, 0, 1, 1, 2, 2]


def test_sequences_depend_on_their_seed_alone() -> None:
    from associative import sequence

    assert (sequence(1024, CORPUS, (0, 1)) == sequence(1024, CORPUS, (0, 1))).all()
    assert (sequence(1024, CORPUS, (0, 1)) != sequence(1024, CORPUS, (1, 1))).any()


def test_distances_are_uniform() -> None:
    from associative import Vocabulary, answers, sequence

    corpus = CORPUS | {"questions": 16, "pairs": 16}
    shares = [
        answer.distance / 2048
        for number in range(40)
        for answer in answers(sequence(2048, corpus, (0, number)).tolist(), Vocabulary.of(corpus))
    ]
    counts = np.histogram(shares, bins=4, range=(0, 1))[0] / len(shares)
    assert counts == pytest.approx([0.25] * 4, abs=0.06)


def test_answers_alone_are_trained(tmp_path: Path) -> None:
    from associative import Vocabulary, answers, make, sequence

    make(tmp_path, CORPUS, 1024)
    for part, (name, count) in enumerate((("tokens", 3), ("held-out", 2))):
        shards = TokenShards(tmp_path / "corpus" / name)
        assert shards.num_documents == count
        for number in range(count):
            tokens = shards.document(number)
            assert (tokens == sequence(1024, CORPUS, (part, number))).all()
        trained = np.flatnonzero(shards.trained(np.arange(1025)))
        first = answers(shards.document(0).tolist(), Vocabulary.of(CORPUS))
        assert trained.tolist() == [answer.position for answer in first]


def test_what_does_not_fit_is_refused() -> None:
    from associative import sequence

    with pytest.raises(UserError, match=r"corpus.keys=80 is less than .* \(90\)"):
        sequence(2048, CORPUS | {"questions": 60}, (0, 0))
    with pytest.raises(UserError, match="corpus.questions=40 do not fit 256 tokens"):
        sequence(256, CORPUS, (0, 0))
