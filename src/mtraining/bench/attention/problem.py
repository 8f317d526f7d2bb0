"""The tensors of a case and one layer of sparse attention over them, phase by phase, as the ring runs it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mtraining.bench.attention.cases import Case
from mtraining.kernel import Backend, Placement, SparseIndex
from mtraining.kernel.backend import Columns
from mtraining.kernel.starts import query_ends
from mtraining.pattern import SequenceShard

BACKWARD_FLOPS = 2.5  # of the forward's


@dataclass(frozen=True)
class Problem:
    """q, dout (1, seq_len, q_heads, head_dim); k, v (1, seq_len, kv_heads, head_dim); the index and its placement."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    index: SparseIndex
    place: Placement

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    @cached_property
    def areas(self) -> tuple[float, float]:
        """Useful area of slash tiles and of columns, over all heads."""
        slash, columns = useful_areas(self.index)
        return float(slash.sum()), float(columns.sum())

    def flops(self, phase: str) -> float:
        """Operations in the useful area of a pass, "forward" or "backward"."""
        return 4 * self.q.shape[-1] * sum(self.areas) * (BACKWARD_FLOPS if phase == "backward" else 1.0)

    def columns_bytes(self) -> int:
        """Of the gathered keys and values."""
        return 2 * self.index.columns.shape[-1] * self.q.shape[2] * self.q.shape[3] * self.q.element_size()

    def keys_bytes(self) -> int:
        """Of all keys and values."""
        return 2 * self.k.numel() * self.k.element_size()


def build(case: Case, device: torch.device, seed: int) -> Problem:
    """Fresh random tensors; the index is the prescribed one."""
    generator = torch.Generator(device).manual_seed(seed)

    def tensor(heads: int) -> Tensor:
        return torch.randn(
            1, case.seq_len, heads, case.head_dim, dtype=case.dtype, device=device, generator=generator
        )

    q, dout = tensor(case.q_heads), tensor(case.q_heads)
    k, v = tensor(case.kv_heads), tensor(case.kv_heads)
    index = case.pattern().estimate(q, k, SequenceShard.whole(case.seq_len, device), case.head_dim**-0.5)
    starts = case.starts()
    if starts is not None:
        index = replace(index, starts=starts.to(device))
    return Problem(case, q, k, v, dout, index, index.placement())


def useful_areas(index: SparseIndex) -> tuple[Tensor, Tensor]:
    """Query-key entries worth computing, of slash tiles and of columns: float64 (batch, q_heads) each.

    Slash tiles whole, the masked half of the diagonal one included; of a column the entries at and below its diagonal
    that no slash tile covers. Entries before a query's start count nowhere. So a kernel that
    computes whole tiles at the edge of a window is compared with another by the same operations.
    """
    if index.starts is not None:
        return _areas_from_starts(index)
    n, size = index.num_blocks, index.block_size
    tiles = torch.arange(n, 0, -1, device=index.diagonals.device, dtype=torch.float64)
    slash = (index.diagonals * tiles).sum(-1) * size * size
    columns = index.columns.long()
    used = columns < index.seq_len
    columns = columns.clamp(max=index.seq_len - 1)
    block = columns // size
    below = index.diagonals.cumsum(-1).gather(-1, n - 1 - block)  # tiles that cover the column
    above = index.diagonals[..., :1] * (columns % size)  # rows of the diagonal tile before the column
    own = (index.seq_len - columns) - (below * size - above)
    return slash, (own * used).sum(-1).double()


def _areas_from_starts(index: SparseIndex) -> tuple[Tensor, Tensor]:
    """:func:`useful_areas` with starts, row by row: the diagonal tile counts whole from the row's start on."""
    assert index.starts is not None and index.blocks is None
    size, device = index.block_size, index.diagonals.device
    starts = index.starts.long()
    block = torch.arange(index.seq_len, device=device) // size
    # Tiles at distances 0 to d, and of the farthest one the keys before the start left out.
    upto = torch.nn.functional.pad(index.diagonals.cumsum(-1, dtype=torch.int64), (1, 0))
    reach = (block - starts // size)[:, None].expand(-1, upto.shape[1], -1)
    farthest = index.diagonals.gather(-1, reach)
    slash = upto.gather(-1, reach + 1) * size - farthest * (starts % size)[:, None]
    # Of each column the queries from it to its end, less those whose tile holds it.
    columns = index.columns.long()
    used = columns < index.seq_len
    columns = columns.clamp(max=index.seq_len - 1)
    ends = query_ends(index.starts, columns.flatten(1)).view_as(columns)
    own, last = columns // size, (ends - 1) // size
    whole = upto.gather(-1, last - own + 1) * size
    before = index.diagonals[..., :1] * (columns % size)
    after = index.diagonals.gather(-1, last - own) * ((last + 1) * size - ends)
    counted = ends - columns - (whole - before - after)
    return slash.sum(-1, dtype=torch.float64), (counted * used).sum(-1, dtype=torch.float64)


@dataclass(frozen=True)
class Layer:
    """One attention layer on one device through a backend."""

    backend: Backend
    p: Problem

    @cached_property
    def slots(self) -> Tensor:
        return torch.arange(self.p.index.seq_len, device=self.p.q.device)

    def columns(self) -> Columns | None:
        """Gathered keys and values, if the case has columns."""
        if not self.p.case.columns:
            return None
        ck, cv = self.backend.gather_columns(self.p.k, self.p.v, self.p.index.columns, self.slots)
        return ck, cv

    def forward(self) -> tuple[Tensor, Tensor]:
        """out in q's dtype, lse."""
        p = self.p
        return self.backend.tiles_forward(
            p.q, p.k, p.v, p.index, p.place, p.scale, None, None, columns=self.columns(), final=True
        )

    def backward(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dq in q's dtype, dk and dv as the backend leaves them."""
        p, columns = self.p, self.columns()
        delta = self.backend.row_delta(out, p.dout)
        if columns is not None:
            grads = self.backend.columns_backward(
                p.dout, p.q, *columns, lse, delta, p.index, p.place.q_blocks, p.scale
            )
        dkv, query_gradient = self.backend.tiles_backward(
            p.dout, p.q, p.k, p.v, lse, delta, p.index, p.place, p.scale
        )
        dq = query_gradient(None, columns=columns, final=True)
        if columns is not None:
            self.backend.scatter_columns(grads, p.index.columns, self.slots, dkv)
        dk, dv = dkv
        return dq, dk, dv

    def phases(self) -> dict[str, Callable[[], object]]:
        out, lse = self.forward()
        return {"forward": self.forward, "backward": lambda: self.backward(out, lse)}
