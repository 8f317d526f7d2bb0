"""How much attention each rank computes for each rank's keys, and the seconds of the kernels that do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtraining.kernel import SparseIndex
from mtraining.layout import Layout
from mtraining.pattern import ToeplitzRandom
from mtraining.pattern.base import SequenceShard
from mtraining.predict.measured import Rates
from mtraining.predict.ring import Compute, Payload, by_source

# Tokens of the side of a tile that rates are of.
_RATE_TILE = 128

# Of the seven products of a backward tile four make the gradients of keys and values, three those of queries.
_KEYS_SHARE, _QUERIES_SHARE = 4 / 7, 3 / 7
_NS = 1e-9


@dataclass(frozen=True, eq=False)
class Index:
    """What a layer attends to, as far as time goes.

    Attributes:
        seq_len: tokens of the whole sequence.
        block_size: tokens of the side of a tile.
        diagonals: float64 (blocks,), the share of heads that select each block diagonal.
        columns: tokens of each head that all later queries read.
        dense: whether the dense kernel computes it.
    """

    seq_len: int
    block_size: int
    diagonals: Tensor
    columns: int
    dense: bool = False

    @staticmethod
    def all_tiles(seq_len: int, block_size: int = _RATE_TILE) -> Index:
        """Every causal tile."""
        return Index(
            seq_len, block_size, torch.ones(seq_len // block_size, dtype=torch.float64), 0, dense=True
        )

    @staticmethod
    def no_tiles(seq_len: int, block_size: int, columns: int, dense: bool = False) -> Index:
        """Columns alone, where tiles were counted elsewhere."""
        return Index(
            seq_len, block_size, torch.zeros(seq_len // block_size, dtype=torch.float64), columns, dense
        )

    @staticmethod
    def prescribed(pattern: ToeplitzRandom, seq_len: int, heads: int) -> Index:
        """The index that `mtraining bench train` and `bench ring` prescribe."""
        q = torch.empty(1, 1, heads, 1)
        found = pattern.estimate(q, q, SequenceShard.whole(seq_len), 1.0)
        return Index.of(found, pattern.columns)

    @staticmethod
    def of(index: SparseIndex, columns: int) -> Index:
        """The mean head of an index's first sequence, with so many columns."""
        return Index(index.seq_len, index.block_size, index.diagonals[0].double().mean(0).cpu(), columns)

    def tiles(self, layout: Layout, world: int) -> Tensor:
        """Tiles of one head that each rank computes for each source's keys: float64 (ranks, sources)."""
        blocks = layout.blocks(self.seq_len, world, self.block_size)
        # Later keys than the query: distances that are negative, and select nothing.
        selected = torch.cat([self.diagonals, torch.zeros_like(self.diagonals)])
        keys = blocks.flatten()
        rows = [selected[mine[:, None] - keys].sum(0).view(world, -1).sum(1) for mine in blocks]
        return torch.stack(rows)

    def column_tiles(self, layout: Layout, world: int) -> Tensor:
        """The area in columns that each rank's queries of one head read, in tiles: float64 (ranks,)."""
        blocks = layout.blocks(self.seq_len, world, self.block_size).double()
        seen = (blocks + 0.5) / len(self.diagonals)
        return seen.sum(1) * self.columns / self.block_size


@dataclass(frozen=True, eq=False)
class LayerWork:
    """One layer's attention on a ring of ranks.

    Attributes:
        tiles: of all query heads: float64 (ranks, sources), as :meth:`Index.tiles` counts them.
        column_tiles: of all query heads: float64 (ranks,).
        rows: block rows of a rank, of all query heads.
        tokens: of a rank.
        columns: tokens of each head that all later queries read.
        dense: whether the dense kernel computes it.
    """

    tiles: Tensor
    column_tiles: Tensor
    rows: int
    tokens: int
    columns: int
    block_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dense: bool

    @staticmethod
    def of(
        index: Index, layout: Layout, world: int, heads: int, kv_heads: int, head_dim: int,
        tiles: Tensor | None = None,
    ) -> LayerWork:  # fmt: skip
        """The work of an index under a layout.

        Args:
            tiles: as the attribute, where they were measured; None counts those of the index.
        """
        return LayerWork(
            tiles=heads * index.tiles(layout, world) if tiles is None else tiles,
            column_tiles=heads * index.column_tiles(layout, world),
            rows=heads * len(index.diagonals) // world,
            tokens=index.seq_len // world,
            columns=index.columns,
            block_size=index.block_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dense=index.dense,
        )

    def messages(self, itemsize: int = 2) -> dict[Payload, float]:
        """Bytes of the ring's messages: keys and values as they are computed with, sums of gradients in fp32."""
        keys = 2 * self.tokens * self.kv_heads * self.head_dim
        sizes: dict[Payload, float] = {"keys": itemsize * keys, "gradients": 4 * keys}
        if self.columns:
            gathered = 2 * self.columns * self.heads * self.head_dim
            sizes |= {"columns": itemsize * gathered, "column gradients": 4 * gathered}
        return sizes

    def cost(self, rates: Rates) -> Callable[[Compute], Tensor]:
        """Seconds of a kernel call on each rank.

        tiles x tile_ns + rows x row_ns, and for the columns column tiles x column_ns. A pass that is not the first one
        reads the sums so far in fp32, one that is not the last writes them.
        """
        attention = rates.attention_at(self.head_dim)
        # A tile of other sides costs by its area.
        area = (self.block_size / _RATE_TILE) ** 2
        memory = 1e9 * rates.memory_gb_per_s
        # Reading or writing a rank's out or dq once in fp32; as long as reading out and dout in two bytes.
        sums = 4.0 * self.tokens * self.heads * self.head_dim / memory

        def tiles(operation: Compute, which: int) -> Tensor:
            count = by_source(self.tiles, operation.offset)
            if self.dense:
                return _NS * area * attention.dense_ns[which] * count
            working = count.clamp(max=self.rows) * self.block_size / _RATE_TILE
            return _NS * (area * attention.tile_ns[which] * count + attention.row_ns[which] * working)

        def columns(which: int) -> Tensor:
            return _NS * area * attention.column_ns[which] * self.column_tiles

        def cost(operation: Compute) -> Tensor:
            nothing = torch.zeros_like(self.column_tiles)
            partial = sums * ((not operation.first) + (not operation.final))
            if operation.kernel == "tiles_forward":
                taken = columns(0) if operation.columns else nothing
                return tiles(operation, 0) + taken + partial
            if operation.kernel == "tiles_backward":
                return _KEYS_SHARE * tiles(operation, 1)
            if operation.kernel == "query_gradient":
                taken = _QUERIES_SHARE * columns(1) if operation.columns else nothing
                return _QUERIES_SHARE * tiles(operation, 1) + taken + partial
            if operation.kernel == "columns_backward":
                return _KEYS_SHARE * columns(1)
            if operation.kernel == "row_delta":
                return nothing + sums
            return nothing  # gathering and scattering columns: tenths of a millisecond of long steps

        return cost
