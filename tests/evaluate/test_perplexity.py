"""Perplexity by position: every token's loss is counted once, in its bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.evaluate.perplexity import document_losses, whole_document_nll
from mtraining.generate.losses import bucketed, merged, perplexity


class Counting:
    """A generator whose loss of a token is the token itself; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Sequence[int]] = []

    def token_nll(self, tokens: Sequence[int]) -> Tensor:
        self.asked.append(tokens)
        return torch.tensor(tokens[1:], dtype=torch.float32)


@pytest.mark.parametrize("bucket", [1, 3, 4, 10, 11, 100])
def test_buckets_hold_the_positions_they_name(bucket: int) -> None:
    length = 11
    found = bucketed(torch.arange(1, length, dtype=torch.float32), bucket, last=4)
    for number, (count, nll) in enumerate(zip(found.bucket_tokens, found.bucket_nll, strict=True)):
        positions = [p for p in range(1, length) if p // bucket == number]
        assert (count, nll) == (len(positions), sum(positions))
    assert (found.tokens, found.nll) == (10, 55) and (found.last_tokens, found.last_nll) == (
        4,
        7 + 8 + 9 + 10,
    )
    assert sum(found.bucket_tokens) == 10 and sum(found.bucket_nll) == 55


@pytest.mark.parametrize("length", [2, 3, 4, 7, 10, 50])
def test_windows_foresee_every_token_once(length: int) -> None:
    generator, tokens = Counting(), list(range(10))
    assert whole_document_nll(generator, tokens, length) == (45.0, 9)  # type: ignore[arg-type]
    assert all(2 <= len(window) <= length for window in generator.asked)


def test_several_documents_weigh_by_their_tokens() -> None:
    long = bucketed(torch.full((9,), 2.0), 5, 3).record()
    short = bucketed(torch.full((4,), 1.0), 5, 3).record()
    found = merged([long, short])
    assert found["perplexity"] == pytest.approx(math.exp((18 + 4) / 13))
    assert found["last"] == pytest.approx(math.exp((6 + 3) / 6))
    assert [(place["from"], place["to"], place["tokens"]) for place in found["by_position"]] == [
        (0, 5, 8),
        (5, 10, 5),
    ]
    assert found["by_position"][0]["perplexity"] == pytest.approx(math.exp((8 + 4) / 8))
    assert found["by_position"][1]["perplexity"] == pytest.approx(math.exp(2))


def test_edges() -> None:
    assert math.isnan(perplexity(0.0, 0))
    with pytest.raises(UserError, match="a document has 5 tokens, fewer than the length 6"):
        document_losses(Counting(), range(5), 6, 4, 2)  # type: ignore[arg-type]
