"""Sequences of token shards, from one source or a mixture of several, dealt to context-parallel ranks by the layout."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from mtraining.data.mixture import Exhausted, Mixture
from mtraining.data.shards import IGNORE, TokenShards
from mtraining.data.vocabulary import check_same_vocabulary
from mtraining.data.windows import LOOK_AHEAD, DatasetReport, Windows, ranked
from mtraining.errors import UserError
from mtraining.layout import Layout


@dataclass(frozen=True)
class DataSource:
    """One of the prepared folders that a run mixes.

    Attributes:
        shards: the documents.
        name: in metrics and messages.
        weight: relative share of the sequences, above 0.
        max_epochs: how often its sequences may be read; None has no end.
    """

    shards: TokenShards
    name: str
    weight: float = 1.0
    max_epochs: float | None = None


@dataclass(frozen=True)
class SourceCount:
    """What one source gives to a run. ``epochs`` counts the readings of its sequences."""

    name: str
    sequences: int
    share: float
    epochs: float

    def render(self) -> str:
        """A few words."""
        return f"{self.name} {self.sequences:,} ({self.share:.1%}, {self.epochs:.2f} epochs)"


class SequenceDataset(Dataset[dict[str, torch.Tensor]]):
    """Map-style dataset of sequences of `seq_len` inputs and their shifted labels, this cp rank's tokens only.

    shards: a `TokenShards` or the path of one; or several `DataSource` to mix.
    mode: ``documents``: every document yields floor((length - 1) / seq_len) full-length windows, its tail and shorter
        documents are left out (and counted in `report`); ``concat``: the documents, each ending in its end-of-text
        token, are one stream cut into windows; ``packed``: full windows as in ``documents``, and tails and shorter
        documents share sequences, whole, in which each sees itself alone.
    seed: of the epoch orders and of packing; None keeps the stored order in every epoch.
    layout, cp_rank, cp_size: which tokens of a window this rank holds; layout None means all (cp_size 1).
    vocab_size: the model's vocabulary; stored ids must lie in it.
    mask_boundaries: in concat mode, label -100 where the next token belongs to another document.
    look_ahead: documents that wait to be packed at one time.

    Items: {"input_ids", "labels", "position_ids"}, each int64 (seq_len / cp_size,), in the layout's local order;
    position_ids are positions within the window. Packed items have "starts" too, int32 (seq_len,), in global order and
    the same on every cp rank: the first position of each token's document. There position_ids begin at 0 in each
    document. What no document fills is padding, at the end of the sequence: end-of-text ids with labels of -100, which
    are one document of their own.

    Attributes:
        sources: the `DataSource` entries; one for a dataset of one folder.
        windows: the `Windows` of each source. A window's number counts through all of them.
        mixture: the source of every sample.

    Raises:
        UserError: shards that cannot be read, no full window, an id outside the vocabulary, sources of different
            tokenizers, a length the layout cannot deal.
    """

    def __init__(
        self,
        shards: TokenShards | Path | str | Sequence[DataSource],
        seq_len: int,
        *,
        mode: str = "documents",
        seed: int | None = 0,
        layout: Layout | None = None,
        cp_rank: int = 0,
        cp_size: int = 1,
        vocab_size: int | None = None,
        mask_boundaries: bool = False,
        look_ahead: int = LOOK_AHEAD,
    ) -> None:
        self.sources = _sources(shards)
        self.seq_len, self.mode, self.seed, self.mask_boundaries = seq_len, mode, seed, mask_boundaries
        if seq_len < 1:
            raise UserError(f"train.seq_len is {seq_len}; it must be at least 1")
        self._deal(layout, cp_rank, cp_size, vocab_size)
        check_same_vocabulary([source.shards for source in self.sources])
        self.windows = [
            Windows(source.shards, seq_len, mode, seed=seed, number=number, look_ahead=look_ahead)
            for number, source in enumerate(self.sources)
        ]
        self._ends = np.cumsum([len(windows) for windows in self.windows])
        self.mixture = Mixture(
            [source.weight for source in self.sources],
            [
                _limit(source, len(windows))
                for source, windows in zip(self.sources, self.windows, strict=True)
            ],
            seed,
        )
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def dealt(
        self, layout: Layout | None, cp_rank: int, cp_size: int, vocab_size: int | None = None
    ) -> SequenceDataset:
        """The same sequences as one cp rank holds them; they are packed once, however often they are dealt.

        Raises:
            UserError: an id outside the vocabulary, a length the layout cannot deal.
        """
        other = copy(self)
        other._deal(layout, cp_rank, cp_size, vocab_size)
        return other

    def _deal(self, layout: Layout | None, cp_rank: int, cp_size: int, vocab_size: int | None) -> None:
        if not 0 <= cp_rank < cp_size:
            raise UserError(f"cp_rank is {cp_rank}; it must lie in 0..{cp_size - 1} for cp_size {cp_size}")
        if layout is None and cp_size > 1:
            raise UserError(f"layout is missing; cp_size {cp_size} needs one of contiguous, zigzag, striped")
        self.vocab_size = vocab_size
        for source in self.sources:
            if vocab_size is not None and source.shards.max_token_id >= vocab_size:
                _refuse_vocabulary(source.shards, vocab_size)
        if layout is None:
            self._positions = np.arange(self.seq_len)
        else:
            layout.check(self.seq_len, cp_size)
            self._positions = layout.positions(self.seq_len, cp_size)[cp_rank].numpy()

    @property
    def report(self) -> DatasetReport:
        """Of all sources together."""
        reports = [windows.report for windows in self.windows]
        return DatasetReport(
            *(sum(values) for values in zip(*(vars(one).values() for one in reports), strict=True))
        )

    @property
    def identity(self) -> str:
        """Which documents these are and how they are mixed, in words and digests: the same wherever they lie."""
        if len(self.sources) == 1 and self.sources[0].max_epochs is None:
            return self.sources[0].shards.identity
        return "; ".join(
            f"{source.shards.identity}, weight {source.weight:g}, "
            + (
                "repeated without end"
                if source.max_epochs is None
                else f"at most {source.max_epochs:g} epochs"
            )
            for source in self.sources
        )

    def render(self) -> str:
        """What is used and what is left aside, a line a source."""
        if len(self.sources) == 1:
            return self.windows[0].report.render()
        return "\n".join(
            f"{source.name}: {windows.report.render()}"
            for source, windows in zip(self.sources, self.windows, strict=True)
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _of(self, window: int) -> tuple[int, int]:
        """The source of a window, and its number there."""
        if not 0 <= window < len(self):
            raise IndexError(f"sequence {window} of {len(self)}")
        source = int(np.searchsorted(self._ends, window, side="right"))
        return source, window - (int(self._ends[source - 1]) if source else 0)

    def __getitem__(self, window: int) -> dict[str, torch.Tensor]:
        source, number = self._of(window)
        shards = self.sources[source].shards
        starts, lengths = self.windows[source].pieces(number)
        # Where each piece begins in the sequence, and padding behind them.
        begins = np.cumsum(lengths) - lengths
        filled = int(lengths.sum())
        if filled < self.seq_len:
            begins = np.append(begins, filled)
            starts = np.append(starts, 0)
        piece = np.searchsorted(begins, self._positions, side="right") - 1
        within = self._positions - begins[piece]
        real = self._positions < filled
        at = starts[piece[real]] + within[real]
        ids = np.full(self._positions.shape, shards.eos_token_id, dtype=np.int64)
        labels = np.full(self._positions.shape, IGNORE, dtype=np.int64)
        ids[real], labels[real] = shards.gather(at), shards.labels(at + 1)
        if self.vocab_size is not None and max(ids.max(), labels.max()) >= self.vocab_size:
            _refuse_vocabulary(shards, self.vocab_size)  # the files changed after the check at the start
        if self.mode == "concat" and self.mask_boundaries:
            # a label is the first token of a document exactly where a document starts
            nearest = np.minimum(np.searchsorted(shards.starts, at + 1), len(shards.starts) - 1)
            labels[shards.starts[nearest] == at + 1] = IGNORE
        item = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(within.astype(np.int64)),
        }
        if self.mode == "packed":
            whole = np.repeat(begins, np.diff(np.append(begins, self.seq_len)))
            item["starts"] = torch.from_numpy(whole.astype(np.int32))
        return item

    def order(self, epoch: int, source: int = 0) -> np.ndarray:
        """int64 (sequences of the source,): its windows in the order of an epoch, numbered from its first; a pure
        function of (seed, epoch, source, number of windows)."""
        length = len(self.windows[source])
        return np.arange(length) if self.seed is None else ranked([self.seed, epoch, source], length)

    def sample(self, number: int) -> int:
        """The window of a sample of the run, a pure function of the dataset and ``number``.

        Raises:
            UserError: all sources have reached their caps.
        """
        try:
            source, place = self.mixture.locate(number)
        except Exhausted as end:
            raise UserError(self._too_short(end.samples, number + 1)) from None
        epoch, place = divmod(place, len(self.windows[source]))
        if source not in self._orders or self._orders[source][0] != epoch:
            self._orders[source] = (epoch, self.order(epoch, source))
        first = int(self._ends[source - 1]) if source else 0
        return first + int(self._orders[source][1][place])

    def counts(self, samples: int) -> list[SourceCount]:
        """What each source gives to the first ``samples`` samples of a run.

        Raises:
            UserError: there are fewer.
        """
        try:
            counts = self.mixture.counts(samples)
        except Exhausted as end:
            raise UserError(self._too_short(end.samples, samples)) from None
        return [
            SourceCount(source.name, count, count / max(samples, 1), count / len(windows))
            for source, windows, count in zip(self.sources, self.windows, counts, strict=True)
        ]

    def _too_short(self, there: int, wanted: int) -> str:
        return (
            f"data.sources: all reach their max_epochs after {there:,} sequences, and the run reads {wanted:,} "
            "(train.steps x train.batch_size); raise max_epochs of a source, add one, or lower train.steps"
        )

    def work(self, windows: Sequence[int]) -> np.ndarray | None:
        """float64 (windows,): attention work of each, as `Windows.work` has it; None where all are alike."""
        if self.mode != "packed":
            return None
        found = []
        for window in windows:
            source, number = self._of(window)
            work = self.windows[source].work
            assert work is not None
            found.append(work[number])
        return np.array(found)

    def padding(self, windows: Sequence[int]) -> int:
        """Positions of these sequences that hold no token."""
        if self.mode != "packed":
            return 0
        return sum(
            self.seq_len - int(self.windows[source].pieces(number)[1].sum())
            for source, number in map(self._of, windows)
        )

    def describe(self, window: int) -> str:
        """A window in words, for messages."""
        source, number = self._of(window)
        words = self.windows[source].describe(number)
        return words if len(self.sources) == 1 else f"{self.sources[source].name}: {words}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_orders": {}}  # reading processes are told windows, and need no order


def _sources(given: TokenShards | Path | str | Sequence[DataSource]) -> list[DataSource]:
    if isinstance(given, (str, Path)):
        given = TokenShards(given)
    if isinstance(given, TokenShards):
        return [DataSource(given, given.path.name)]
    return list(given)


def _limit(source: DataSource, windows: int) -> int | None:
    """The most samples of a source: whole sequences, at least one."""
    return None if source.max_epochs is None else max(1, int(source.max_epochs * windows))


def _refuse_vocabulary(shards: TokenShards, vocab_size: int) -> None:
    for name, tokens in shards.documents():
        if int(tokens.max()) >= vocab_size:
            raise UserError(
                f"dataset '{shards.path}': document '{name}' holds token id {int(tokens.max())}, outside the "
                f"model's vocabulary of {vocab_size}; prepare it again with the model's tokenizer"
            )
    raise UserError(
        f"dataset '{shards.path}': meta.json names token id {shards.max_token_id}, outside the model's "
        f"vocabulary of {vocab_size}, yet no document holds it; prepare it again"
    )
