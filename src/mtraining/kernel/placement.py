"""Where the blocks of one kernel call stand in the global sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

_MOST_GROUPS = 8  # of query blocks in one call: more of them are too small to be worth launches of their own


@dataclass(frozen=True)
class Piece:
    """A rectangle of causal attention over local blocks, as dense kernels take it.

    Attributes:
        queries, keys: local blocks, contiguous.
        causal: keys are the blocks of the queries themselves, and the upper triangle is masked; else nothing is.
    """

    queries: slice
    keys: slice
    causal: bool

    def rows(self, block_size: int) -> tuple[slice, slice]:
        """Local tokens of the queries and of the keys."""
        return _scaled(self.queries, block_size), _scaled(self.keys, block_size)


@dataclass(frozen=True)
class Placement:
    """Global block numbers of the local queries and of the visiting keys.

    A kernel sees local tensors; only these small tables tell it which global rows and columns they are. So one kernel
    serves every layout that keeps whole blocks together (contiguous, zigzag, striped).

    Attributes:
        q_blocks: int64 (local query blocks,), global number of each local query block, ascending.
        k_blocks: int64 (visiting key blocks,), global number of each visiting key block, ascending.
        num_blocks: blocks in the whole sequence.
        step: (stride, offset) where both tables are arithmetic progressions of that stride and
            ``q_blocks[i] - k_blocks[j] == stride * (i - j) + offset``; None where they are not, or where nobody looked.
            Known on the host, so that kernels can be launched without waiting for the device. :func:`progression`
            finds it.
        pieces: full causal attention of these queries over these keys as a few dense rectangles; None where it takes
            many, or where nobody looked. Known on the host. :func:`causal_pieces` finds them.
    """

    q_blocks: Tensor
    k_blocks: Tensor
    num_blocks: int
    step: tuple[int, int] | None = None
    pieces: tuple[Piece, ...] | None = None

    @cached_property
    def q_slots(self) -> Tensor:
        """int32 (num_blocks,): local place of a global query block, -1 where this call does not hold it."""
        return _slots(self.q_blocks, self.num_blocks)

    @cached_property
    def k_slots(self) -> Tensor:
        """int32 (num_blocks,): local place of a global key block, -1 where this call does not hold it."""
        return _slots(self.k_blocks, self.num_blocks)

    @cached_property
    def reachable_diagonals(self) -> Tensor:
        """bool (num_blocks,): block distances that join some query block and some key block of this call.

        In a striped layout that is one residue class modulo the ring's size: the rest need not be looked at.
        """
        distance = (self.q_blocks[:, None] - self.k_blocks[None, :]).flatten()
        reachable = torch.zeros(self.num_blocks + 1, dtype=torch.bool, device=distance.device)
        reachable[torch.where(distance >= 0, distance, self.num_blocks)] = True
        return reachable[:-1]


def progression(q_blocks: Tensor, k_blocks: Tensor) -> tuple[int, int] | None:
    """:attr:`Placement.step` for tables on the CPU (on a GPU this would wait for the device)."""
    steps = torch.cat([q_blocks.diff(), k_blocks.diff()])
    stride = int(steps[0]) if steps.numel() else 1
    if not bool((steps == stride).all()):
        return None
    return stride, int(q_blocks[0] - k_blocks[0])


def causal_pieces(q_blocks: Tensor, k_blocks: Tensor) -> tuple[Piece, ...] | None:
    """:attr:`Placement.pieces` for tables on the CPU (on a GPU this would wait for the device).

    Both tables ascend, so the keys before a query block are a prefix of the local ones, whatever gaps there are. Query
    blocks go together while their prefix stays the same, or while each is itself the key that ends it. So
    contiguous and zigzag layouts take one piece a step of the ring, or none; and a rank's own keys one in any layout.
    """
    before = torch.searchsorted(k_blocks, q_blocks)
    own = torch.isin(q_blocks, k_blocks)
    starts = torch.ones_like(own)
    starts[1:] = (own[1:] != own[:-1]) | (before.diff() != own[1:].long())
    bounds = [*starts.nonzero().flatten().tolist()[: _MOST_GROUPS + 1], q_blocks.numel()]
    if len(bounds) > _MOST_GROUPS + 1:
        return None
    pieces: list[Piece] = []
    for first, end in pairwise(bounds):
        queries, prefix = slice(first, end), int(before[first])
        if prefix:
            pieces.append(Piece(queries, slice(0, prefix), causal=False))
        if own[first]:
            pieces.append(Piece(queries, slice(prefix, prefix + end - first), causal=True))
    return tuple(pieces)


def _scaled(blocks: slice, block_size: int) -> slice:
    return slice(blocks.start * block_size, blocks.stop * block_size)


def _slots(blocks: Tensor, num_blocks: int) -> Tensor:
    slots = torch.full((num_blocks,), -1, dtype=torch.int32, device=blocks.device)
    slots[blocks] = torch.arange(blocks.numel(), dtype=torch.int32, device=blocks.device)
    return slots
