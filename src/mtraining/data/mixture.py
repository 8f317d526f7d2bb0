"""Which source the next sequence comes from: weights met from the first step on, and caps on repetition.

Sample n of a run takes a point of the unit interval, which the weights divide among the sources. The points are the
multiples of the golden ratio, modulo 1. Any run of them is spread evenly, so every step has its mix nearly exactly.
They are integers modulo 2^64, so no machine rounds them otherwise.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio
_CHUNK = 1 << 14


class Exhausted(Exception):
    """Every source has reached its cap; ``samples`` are there."""

    def __init__(self, samples: int) -> None:
        super().__init__(f"all sources end after {samples} samples")
        self.samples = samples


@dataclass(frozen=True)
class _Chunk:
    """Samples from ``first`` on: the source of each, and how many of each source came before."""

    first: int
    sources: np.ndarray
    before: np.ndarray


class Mixture:
    """The source of every sample, a pure function of the arguments and the sample's number.

    A source that has given ``limits`` samples gives no more; the others share its weight from then on.

    Args:
        weights: relative shares of the sequences, above 0.
        limits: most samples of each source; None has no end.
        seed: where the points begin; None is 0.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None], seed: int | None) -> None:
        self.weights, self.limits = tuple(weights), tuple(limits)
        self._offset = (
            0 if seed is None else int(np.random.SeedSequence([seed]).generate_state(1, np.uint64)[0])
        )
        self._chunks: list[_Chunk] = []
        self._next, self._counts = 0, np.zeros(len(self.weights), dtype=np.int64)

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and how many samples of that source came before.

        Raises:
            Exhausted: there are fewer samples.
        """
        if len(self.weights) == 1:
            limit = self.limits[0]
            if limit is not None and sample >= limit:
                raise Exhausted(limit)
            return 0, sample
        chunk = self._chunk(sample)
        place = sample - chunk.first
        source = int(chunk.sources[place])
        return source, int(chunk.before[source] + (chunk.sources[:place] == source).sum())

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` samples each source gives.

        Raises:
            Exhausted: there are fewer samples.
        """
        if samples == 0:
            return [0] * len(self.weights)
        if len(self.weights) == 1:
            return [self.locate(samples - 1)[1] + 1]
        chunk = self._chunk(samples - 1)
        here = np.bincount(chunk.sources[: samples - chunk.first], minlength=len(self.weights))
        return (chunk.before + here).tolist()

    def _chunk(self, sample: int) -> _Chunk:
        while sample >= self._next:
            self._grow()
        return self._chunks[bisect_right(self._chunks, sample, key=lambda chunk: chunk.first) - 1]

    def _grow(self) -> None:
        """Decide the next samples, up to the one at which a source reaches its cap."""
        left = [
            None if limit is None else limit - count
            for limit, count in zip(self.limits, self._counts.tolist(), strict=True)
        ]
        live = [source for source, rest in enumerate(left) if rest is None or rest > 0]
        if not live:
            raise Exhausted(self._next)
        total = sum(Fraction(self.weights[source]) for source in live)
        shares = np.cumsum([Fraction(self.weights[source]) / total for source in live])[:-1]
        bounds = np.array([int(share * 2**64) for share in shares], dtype=np.uint64)
        numbers = np.arange(self._next, self._next + _CHUNK, dtype=np.uint64)
        points = numbers * np.uint64(_STRIDE) + np.uint64(self._offset)  # modulo 2^64
        sources = np.array(live, dtype=np.int16)[np.searchsorted(bounds, points, side="right")]
        for source in live:
            rest = left[source]
            taken = np.flatnonzero(sources == source)
            if rest is not None and len(taken) >= rest:
                sources = sources[: taken[rest - 1] + 1]
        self._chunks.append(_Chunk(self._next, sources, self._counts.copy()))
        self._counts += np.bincount(sources, minlength=len(self.weights))
        self._next += len(sources)
