"""The sequences that one folder of token shards gives, and which part of its stream each of them reads.

A sequence is made of pieces. A piece is a run of the stream: each of its tokens is an input whose label is the token
after it. So a document of n tokens has n - 1 inputs; its last token, the end-of-text id, is a label only. Training on
it as an input would change nothing, since what comes after it belongs to another document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtraining.data.packing import best_fit
from mtraining.data.shards import TokenShards
from mtraining.errors import UserError, nearest

MODES = ("documents", "concat", "packed")
LOOK_AHEAD = 1024
# Beside an epoch's number in the seed of an order; no epoch is as large.
_PACKING = 0x7061636B


@dataclass(frozen=True)
class DatasetReport:
    """What a dataset uses and what it leaves aside. Tokens are input tokens of one epoch.

    Attributes:
        windows: sequences of an epoch.
        documents_used, documents_too_short: documents with and without an input token in a sequence.
        tokens_used, tokens_unused: tokens that are an input in a sequence, and the others.
        padding: positions of the sequences that hold no token.
        windows_untrained: sequences (of packed ones, pieces of documents) that are left out because no token of theirs
            is trained, as of a long prompt.
    """

    windows: int
    documents_used: int
    documents_too_short: int
    tokens_used: int
    tokens_unused: int
    padding: int = 0
    windows_untrained: int = 0

    def render(self) -> str:
        """One line."""
        share = self.padding / (self.tokens_used + self.padding)
        padding = f", {share:.2%} padding" if self.padding else ""
        untrained = f"; {self.windows_untrained:,} sequences without a trained token left out"
        return (
            f"{self.windows:,} sequences ({self.tokens_used:,} tokens an epoch{padding}) of {self.documents_used:,} "
            f"documents; {self.documents_too_short:,} documents too short, {self.tokens_unused:,} tokens unused"
            f"{untrained if self.windows_untrained else ''}"
        )


class Windows:
    """The sequences of one source in one mode. Numbers of windows do not change from epoch to epoch.

    Args:
        shards: the documents.
        seq_len: input tokens of a sequence.
        mode: ``documents``: every document yields floor((length - 1) / seq_len) full-length windows, its tail and
            shorter documents are left out; ``concat``: the documents are one stream cut into windows; ``packed``: full
            windows as in ``documents``, and tails and shorter documents share sequences, whole.
        seed: of the order in which documents wait to be packed; None takes them as they are stored.
        number: of the source among several, part of the seed.
        look_ahead: documents that wait to be packed at one time.

    Attributes:
        work: float64 (len,) of packed windows, the sum of squares of the lengths of documents, padding counted as one:
            proportional to the pairs of tokens that attend. None where all windows are alike.

    Windows and pieces without a trained label are left out: a step of nothing else would have no loss.

    Raises:
        UserError: no window at all, or none with a trained label.
    """

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        mode: str,
        *,
        seed: int | None = 0,
        number: int = 0,
        look_ahead: int = LOOK_AHEAD,
    ) -> None:
        if mode not in MODES:
            near = nearest(mode, MODES, 0.0)
            raise UserError(
                f"data.mode '{mode}' is unknown; did you mean '{near}'? (one of {', '.join(MODES)})"
            )
        if look_ahead < 1:
            raise UserError(f"data.look_ahead is {look_ahead}; it must be at least 1 document")
        self.shards, self.seq_len, self.mode = shards, seq_len, mode
        starts, lengths = self._cut()
        if not len(starts):
            self._refuse_short()
        untrained = 0
        if shards.masked:
            trained = [
                shards.any_trained(at + 1, at + n + 1)
                for at, n in zip(starts.tolist(), lengths.tolist(), strict=True)
            ]
            starts, lengths, untrained = starts[trained], lengths[trained], trained.count(False)
            if not len(starts):
                raise UserError(
                    f"dataset '{shards.path}' has no sequence of train.seq_len {seq_len:,} with a trained token; "
                    "prepare it again with --train-on all, or raise train.seq_len"
                )
        self._ends = np.arange(1, len(starts) + 1)
        self.work: np.ndarray | None = None
        if mode == "packed":
            order = np.arange(len(starts)) if seed is None else ranked([seed, _PACKING, number], len(starts))
            packed, self._ends = best_fit(lengths[order], seq_len, look_ahead)
            starts, lengths = starts[order][packed], lengths[order][packed]
            firsts = np.concatenate([[0], self._ends[:-1]])
            room = seq_len - np.add.reduceat(lengths, firsts)
            self.work = np.add.reduceat(lengths**2.0, firsts) + room**2.0
        self._starts, self._lengths = starts, lengths
        inputs = shards.lengths - 1
        used = {"documents": inputs >= seq_len, "concat": inputs >= 0, "packed": inputs > 0}[mode]
        tokens = int(lengths.sum())
        self.report = DatasetReport(
            windows=len(self),
            documents_used=int(used.sum()),
            documents_too_short=int((~used).sum()),
            tokens_used=tokens,
            tokens_unused=shards.num_tokens - tokens,
            padding=len(self) * seq_len - tokens,
            windows_untrained=untrained,
        )

    def _cut(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each piece that the mode takes from the stream begins, and its length: int64 (pieces,) twice."""
        shards, size = self.shards, self.seq_len
        if self.mode == "concat":
            starts = np.arange((shards.num_tokens - 1) // size) * size
            return starts, np.full(starts.shape, size)
        inputs = shards.lengths - 1
        cuts = -(-inputs // size) if self.mode == "packed" else inputs // size
        document = np.repeat(np.arange(len(inputs)), cuts)
        offsets = (np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * size
        return shards.starts[document] + offsets, np.minimum(inputs[document] - offsets, size)

    def _refuse_short(self) -> None:
        shards = self.shards
        if self.mode == "packed":
            raise UserError(
                f"dataset '{shards.path}' has no document of two tokens, so no token has a label; prepare longer text"
            )
        if self.mode == "concat":
            raise UserError(
                f"dataset '{shards.path}' has {shards.num_tokens:,} tokens, fewer than one sequence of train.seq_len "
                f"{self.seq_len:,} and its last label; lower train.seq_len to at most {shards.num_tokens - 1:,} or add "
                "text"
            )
        longest = int(shards.lengths.argmax())
        tokens = int(shards.lengths[longest])
        raise UserError(
            f"dataset '{shards.path}' has no document of train.seq_len {self.seq_len:,} tokens and one more: the "
            f"longest, '{shards.name(longest)}', has {tokens:,}; lower train.seq_len to at most {tokens - 1:,}, add "
            "longer documents, "
            "or use data.mode=packed"
        )

    def __len__(self) -> int:
        return len(self._ends)

    def pieces(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the pieces of a window begin in the stream, and their lengths: int64 (pieces,) twice.

        They stand one after another from the start of the sequence; only a packed one may have room behind them.
        """
        if not 0 <= window < len(self):
            raise IndexError(f"sequence {window} of {len(self)}")
        these = slice(self._ends[window - 1] if window else 0, self._ends[window])
        return self._starts[these], self._lengths[these]

    def describe(self, window: int, most: int = 3) -> str:
        """A window in words, for messages; of many documents the first ``most``."""
        starts, lengths = self.pieces(window)
        shown = []
        for start, length in zip(starts[:most].tolist(), lengths[:most].tolist(), strict=True):
            document = self.shards.document_at(start)
            first = start - int(self.shards.starts[document])
            shown.append(f"document '{self.shards.name(document)}', tokens {first}..{first + length}")
        more = f", and {len(starts) - most} more documents" if len(starts) > most else ""
        return ", ".join(shown) + more


def ranked(seed: list[int], count: int) -> np.ndarray:
    """int64 (count,): a random order.

    Ranks raw generator output: numpy promises that stream for good, but not that of `permutation`.
    """
    raw = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(raw, kind="stable")
