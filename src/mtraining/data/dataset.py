"""Full-length or packed sequences from token shards, dealt to context-parallel ranks by the layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from mtraining.data.shards import IGNORE, TokenShards
from mtraining.errors import UserError
from mtraining.layout import Layout

MODES = ("documents", "concat")


@dataclass(frozen=True)
class DatasetReport:
    """What a dataset uses and what it leaves aside. Tokens are input tokens of one epoch.

    Attributes:
        windows: sequences of an epoch.
        windows_untrained: sequences that are left out because no token of theirs is trained, as of a long prompt.
    """

    windows: int
    documents_used: int
    documents_too_short: int
    tokens_used: int
    tokens_unused: int
    windows_untrained: int = 0

    def render(self) -> str:
        """One line."""
        untrained = f"; {self.windows_untrained:,} sequences without a trained token left out"
        return (
            f"{self.windows:,} sequences ({self.tokens_used:,} tokens an epoch) of {self.documents_used:,} documents; "
            f"{self.documents_too_short:,} documents too short, {self.tokens_unused:,} tokens unused"
            f"{untrained if self.windows_untrained else ''}"
        )


class SequenceDataset(Dataset[dict[str, torch.Tensor]]):
    """Map-style dataset of windows of `seq_len` inputs and their shifted labels, this cp rank's tokens only.

    shards: a `TokenShards` or the path of one.
    mode: ``documents``: every document yields floor((length - 1) / seq_len) full-length windows, its tail and shorter
        documents are left out (and counted in `report`); ``concat``: the documents, each ending in its end-of-text
        token, are one stream cut into windows.
    seed: of the epoch orders; None keeps the stored order in every epoch.
    layout, cp_rank, cp_size: which tokens of a window this rank holds; layout None means all (cp_size 1).
    vocab_size: the model's vocabulary; stored ids must lie in it.
    mask_boundaries: in concat mode, label -100 where the next token belongs to another document.

    Items: {"input_ids", "labels", "position_ids"}, each int64 (seq_len / cp_size,), in the layout's local order;
    position_ids are positions within the window.

    Raises:
        UserError: shards that cannot be read, no full window, an id outside the vocabulary, a length the layout
            cannot deal.
    """

    def __init__(
        self,
        shards: TokenShards | Path | str,
        seq_len: int,
        *,
        mode: str = "documents",
        seed: int | None = 0,
        layout: Layout | None = None,
        cp_rank: int = 0,
        cp_size: int = 1,
        vocab_size: int | None = None,
        mask_boundaries: bool = False,
    ) -> None:
        self.shards = shards if isinstance(shards, TokenShards) else TokenShards(shards)
        self.seq_len, self.mode, self.seed, self.mask_boundaries = seq_len, mode, seed, mask_boundaries
        if mode not in MODES:
            raise UserError(f"data.mode '{mode}' is unknown; use {' or '.join(MODES)}")
        if seq_len < 1:
            raise UserError(f"train.seq_len is {seq_len}; it must be at least 1")
        if not 0 <= cp_rank < cp_size:
            raise UserError(f"cp_rank is {cp_rank}; it must lie in 0..{cp_size - 1} for cp_size {cp_size}")
        if layout is None and cp_size > 1:
            raise UserError(f"layout is missing; cp_size {cp_size} needs one of contiguous, zigzag, striped")
        self.vocab_size = vocab_size
        if vocab_size is not None and self.shards.max_token_id >= vocab_size:
            self._refuse_vocabulary(vocab_size)
        if layout is None:
            self._positions = np.arange(seq_len)
        else:
            layout.check(seq_len, cp_size)
            self._positions = layout.positions(seq_len, cp_size)[cp_rank].numpy()
        per_document = (self.shards.lengths - 1) // seq_len
        # the windows of documents up to and including each: window i belongs to the first whose count exceeds i
        self._last_windows = np.cumsum(per_document)
        self._length = (
            int(self._last_windows[-1]) if mode == "documents" else (self.shards.num_tokens - 1) // seq_len
        )
        if self._length == 0:
            self._refuse_short()
        # the windows to use, of those that lie in the stream; None for all
        self._kept: np.ndarray | None = None
        found = self._length
        if self.shards.masked:
            self._keep_trained()
        used = per_document > 0 if mode == "documents" else np.ones(self.shards.num_documents, dtype=bool)
        self.report = DatasetReport(
            windows=self._length,
            documents_used=int(used.sum()),
            documents_too_short=int((~used).sum()),
            tokens_used=self._length * seq_len,
            tokens_unused=self.shards.num_tokens - self._length * seq_len,
            windows_untrained=found - self._length,
        )

    def _keep_trained(self) -> None:
        """Leave out windows without a trained label: a step of nothing else would have no loss."""
        starts = (self._start(window) for window in range(self._length))
        trained = [self.shards.any_trained(start + 1, start + self.seq_len + 1) for start in starts]
        kept = np.flatnonzero(trained)
        if not kept.size:
            raise UserError(
                f"dataset '{self.shards.path}' has no sequence of train.seq_len {self.seq_len:,} with a trained token; "
                "prepare it again with --train-on all, or raise train.seq_len"
            )
        if kept.size < self._length:
            self._kept, self._length = kept, int(kept.size)

    def _refuse_short(self) -> None:
        shards = self.shards
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
            "or use data.mode=concat"
        )

    def _refuse_vocabulary(self, vocab_size: int) -> None:
        for name, tokens in self.shards.documents():
            if int(tokens.max()) >= vocab_size:
                raise UserError(
                    f"dataset '{self.shards.path}': document '{name}' holds token id {int(tokens.max())}, outside the "
                    f"model's vocabulary of {vocab_size}; prepare it again with the model's tokenizer"
                )
        raise UserError(
            f"dataset '{self.shards.path}': meta.json names token id {self.shards.max_token_id}, outside the model's "
            f"vocabulary of {vocab_size}, yet no document holds it; prepare it again"
        )

    def __len__(self) -> int:
        return self._length

    def start(self, window: int) -> int:
        """Where a window begins in the token stream."""
        if not 0 <= window < self._length:
            raise IndexError(f"sequence {window} of {self._length}")
        return self._start(window if self._kept is None else int(self._kept[window]))

    def _start(self, window: int) -> int:
        """Where a window begins, of all that lie in the stream."""
        if self.mode == "concat":
            return window * self.seq_len
        document = int(np.searchsorted(self._last_windows, window, side="right"))
        before = int(self._last_windows[document - 1]) if document else 0
        return int(self.shards.starts[document]) + (window - before) * self.seq_len

    def __getitem__(self, window: int) -> dict[str, torch.Tensor]:
        at = self.start(window) + self._positions
        ids, labels = self.shards.gather(at), self.shards.labels(at + 1)
        if self.vocab_size is not None and max(ids.max(), labels.max()) >= self.vocab_size:
            self._refuse_vocabulary(self.vocab_size)  # the files changed after the check at the start
        if self.mode == "concat" and self.mask_boundaries:
            # a label is the first token of a document exactly where a document starts
            starts = self.shards.starts
            nearest = np.minimum(np.searchsorted(starts, at + 1), len(starts) - 1)
            labels[starts[nearest] == at + 1] = IGNORE
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(self._positions.astype(np.int64)),
        }

    def order(self, epoch: int) -> np.ndarray:
        """int64 (len,): the windows in the order of an epoch, a pure function of (seed, epoch, len).

        Ranks raw generator output: numpy promises that stream for good, but not that of `permutation`.
        """
        if self.seed is None:
            return np.arange(self._length)
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self._length)
        return np.argsort(raw, kind="stable")

    def describe(self, window: int) -> str:
        """A window in words, for messages."""
        start = self.start(window)
        document = self.shards.document_at(start)
        first = start - int(self.shards.starts[document])
        return f"document '{self.shards.name(document)}', tokens {first}..{first + self.seq_len}"
