"""Losses by position: whether a longer context helps to foresee a text, and where it stops to help.

Perplexities are exp of the token-weighted mean negative log-likelihood, never means of perplexities.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """Sums of negative log-likelihood (natural log) of one stretch of text.

    Attributes:
        tokens, nll: tokens that were foreseen, and the sum of their losses.
        bucket: positions a bucket spans.
        bucket_tokens, bucket_nll: the same by position, bucket after bucket.
        last_tokens, last_nll: the same of the last tokens alone.
    """

    tokens: int
    nll: float
    bucket: int
    bucket_tokens: tuple[int, ...]
    bucket_nll: tuple[float, ...]
    last_tokens: int
    last_nll: float

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def bucketed(nll: Tensor, bucket: int, last: int) -> Losses:
    """Sums of a sequence's token losses.

    Args:
        nll: (tokens - 1,); entry i is the loss of the token at position i + 1.
        bucket: positions a bucket spans; the token at position p belongs to bucket p // bucket.
        last: how many of the last tokens are summed apart.
    """
    nll = nll.double()
    edges = range(0, len(nll) + 1, bucket)
    # Position 0 has no loss, so bucket b holds entries b * bucket - 1 to (b + 1) * bucket - 2.
    parts = [nll[max(edge - 1, 0) : edge + bucket - 1] for edge in edges]
    tail = nll[-last:]
    return Losses(
        tokens=len(nll),
        nll=float(nll.sum()),
        bucket=bucket,
        bucket_tokens=tuple(len(part) for part in parts),
        bucket_nll=tuple(float(part.sum()) for part in parts),
        last_tokens=len(tail),
        last_nll=float(tail.sum()),
    )


def perplexity(nll: float, count: int) -> float:
    """exp(nll / count); NaN for nothing, infinite beyond the range of a float."""
    mean = nll / count if count else math.nan
    return math.inf if mean > math.log(sys.float_info.max) else math.exp(mean)


def merged(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Perplexities over several documents of one length, from the records of their `Losses`.

    Returns:
        ``perplexity``, ``last`` and ``by_position``: a list of {"from", "to", "perplexity", "tokens"}.
    """
    records = list(records)
    buckets: dict[int, list[float]] = {}
    for record in records:
        for place, (nll, count) in enumerate(zip(record["bucket_nll"], record["bucket_tokens"], strict=True)):
            total = buckets.setdefault(place * record["bucket"], [0.0, 0, record["bucket"]])
            total[0] += nll
            total[1] += count
    return {
        "perplexity": perplexity(sum(r["nll"] for r in records), sum(r["tokens"] for r in records)),
        "last": perplexity(sum(r["last_nll"] for r in records), sum(r["last_tokens"] for r in records)),
        "by_position": [
            {
                "from": start,
                "to": start + int(width),
                "perplexity": perplexity(nll, int(count)),
                "tokens": int(count),
            }
            for start, (nll, count, width) in sorted(buckets.items())
            if count
        ],
    }
