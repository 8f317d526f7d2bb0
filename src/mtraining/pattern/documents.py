"""The documents of packed sequences, as an estimate needs them: whose token is whose, in tokens and in blocks.

A document begins where a query may attend to nothing before itself: ``starts[q] == q``. Documents, chunks, and
documents under a sliding window all read like this. A window alone has one document.

A block of tokens may hold several documents. Two of them matter to other blocks. The *lead* is the document of the
block's first row: it alone has keys in earlier blocks. The *tail* is the document of the block's last row: it alone has
queries in later blocks. All others see nothing but this block, whose own tile every pattern selects. So patterns pool
the queries of the lead and the keys of the tail. What they choose for one document then depends on no other.

Nothing here waits for the device, and no shape depends on how many documents there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Whose token is whose.

    Attributes:
        starts: int64 (batch, seq_len), the first key that each query may attend.
        first: int64 (batch, seq_len), position of the first token of each token's document.
        past: int64 (batch, seq_len), position after the last token of each token's document.
        length: real tokens of a sequence. Padding behind them is a document of its own.
    """

    starts: Tensor
    first: Tensor
    past: Tensor
    length: int

    @classmethod
    def of(cls, starts: Tensor, length: int) -> Documents:
        """The documents that ``starts`` (batch, seq_len) tell of."""
        batch, seq_len = starts.shape
        place = torch.arange(seq_len, device=starts.device).expand(batch, -1)
        opens = (starts == place) | (place == length)
        first = torch.where(opens, place, 0).cummax(1).values
        following = torch.where(opens, place, seq_len)[:, 1:]
        following = torch.nn.functional.pad(following, (0, 1), value=seq_len)
        past = following.flip(1).cummin(1).values.flip(1)
        return cls(starts.long(), first, past, length)

    @property
    def seq_len(self) -> int:
        return self.first.shape[1]

    @property
    def sizes(self) -> Tensor:
        """int64 (batch, seq_len): tokens of each token's document; 0 for padding."""
        return torch.where(self.first < self.length, self.past - self.first, 0)

    def of_rows(self, rows: Tensor) -> Documents:
        """One sequence for each number of a batch row: int64 (n,)."""
        starts, first, past = (_of_rows(x, rows) for x in (self.starts, self.first, self.past))
        return Documents(starts, first, past, self.length)

    def in_lead(self, block_size: int) -> Tensor:
        """bool (batch, seq_len): the token is of the same document as its block's first row."""
        return self.first == self.first[:, ::block_size].repeat_interleave(block_size, 1)

    def in_tail(self, block_size: int) -> Tensor:
        """bool (batch, seq_len): the token is of the same document as its block's last row."""
        return self.first == self.first[:, block_size - 1 :: block_size].repeat_interleave(block_size, 1)

    def visible(self, blocks: Tensor, block_size: int) -> Tensor:
        """Which key blocks some query of each block may attend: bool (batch, len(blocks), blocks of the sequence).

        Args:
            blocks: int64, global numbers of query blocks.
        """
        key = torch.arange(self.seq_len // block_size, device=blocks.device)
        nearest = self.starts[:, blocks * block_size] // block_size
        return (key >= nearest[..., None]) & (key <= blocks[:, None])


@dataclass(frozen=True)
class DiagonalSlots:
    """Places for the block diagonals of every document in one row of 2 * blocks entries.

    A document from block a to block b > a has b - a + 1 diagonals, from entry 2 a on. The next document begins in block
    b or later, so places never overlap. Documents inside one block have the tile of that block and need no place.

    Attributes:
        base: int64 (batch, seq_len), place of diagonal 0 of each token's document.
        reach: int64 (batch, seq_len), diagonals of each token's document; 0 inside one block.
        first: int64 (batch, slots), place of diagonal 0 of the document that an entry belongs to.
        count: int64 (batch, slots), diagonals of that document; entries from ``first + count`` on are unused.
    """

    base: Tensor
    reach: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, documents: Documents, block_size: int) -> DiagonalSlots:
        batch, seq_len = documents.first.shape
        slots = 2 * (seq_len // block_size)
        begin, end = documents.first // block_size, (documents.past - 1) // block_size
        reach = torch.where(end > begin, end - begin + 1, 0)
        place = torch.arange(seq_len, device=begin.device)
        opens = (place == documents.first) & (reach > 0)
        into = torch.where(opens, 2 * begin, slots)  # the last entry takes what has no place
        count = begin.new_zeros(batch, slots + 1).scatter_(1, into, reach)[:, :slots]
        first = torch.where(count > 0, torch.arange(slots, device=begin.device), 0).cummax(1).values
        return cls(2 * begin, reach, first, count.gather(1, first))

    def of_rows(self, rows: Tensor) -> DiagonalSlots:
        """As :meth:`Documents.of_rows` has it."""
        return DiagonalSlots(*(_of_rows(x, rows) for x in (self.base, self.reach, self.first, self.count)))

    @property
    def offsets(self) -> Tensor:
        """int64 (batch, slots): the block diagonal that an entry stands for."""
        return torch.arange(self.first.shape[1], device=self.first.device) - self.first


def _of_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x`` (batch, n) at batch rows ``rows``: (len(rows), n), without a copy where there is one."""
    return x.expand(len(rows), -1) if x.shape[0] == 1 else x[rows]


class Ranking:
    """The entries of contiguous segments, heaviest first within each; lower positions first among equals.

    Sums are of integers. A sum of floats would carry the rounding of one segment into the next.

    Args:
        weight: (rows, n), non-negative or -1 (last of all); inf comes first.
        first: int64 (rows, n), position of the first entry of each entry's segment.
    """

    def __init__(self, weight: Tensor, first: Tensor) -> None:
        self._first = first
        if weight.dtype == torch.float32:
            # Bits of floats from 0 up are ordered as the floats are, and -1 lies below them as an integer.
            bits = weight.contiguous().view(torch.int32).long()
            self.order = ((first << 33) - bits).sort(dim=1, stable=True).indices
        else:
            heaviest = weight.sort(dim=1, descending=True, stable=True).indices
            self.order = heaviest.gather(1, first.gather(1, heaviest).sort(dim=1, stable=True).indices)
        # A segment takes the same places after sorting as before.
        self.rank = torch.arange(first.shape[1], device=first.device) - first

    def before(self, values: Tensor) -> Tensor:
        """Sum of what ranks before each entry in its segment; int64 (rows, n), by rank."""
        ranked = values.gather(1, self.order)
        before = ranked.cumsum(1) - ranked
        return before - before.gather(1, self._first)

    def chosen(self, wanted: Tensor) -> Tensor:
        """``wanted`` bool (rows, n), by rank -> by position."""
        return torch.zeros_like(wanted).scatter_(1, self.order, wanted)


def integer_masses(mass: Tensor, most: int) -> Tensor:
    """Masses that sum to at most ``most`` a row as integers below 2^53, rounded up so that none is lost."""
    return (mass.double() * 2.0 ** (51 - most.bit_length())).ceil().long()


def segment_totals(values: Tensor, first: Tensor, past: Tensor) -> Tensor:
    """Sum of int64 ``values`` (rows, n) over each entry's segment; ``past``: the place after its last entry."""
    upto = values.cumsum(1)
    return upto.gather(1, past - 1) - (upto - values).gather(1, first)
