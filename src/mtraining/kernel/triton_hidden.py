"""Which columns a block of queries must not see, as bits: one for each (query block, column).

Set where a slash tile of the block holds the column (it belongs to that tile), where the column lies after the block,
and in the padding. A bit costs one look-up in the head's bitmap, made once a call instead of in each kernel and tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtraining.kernel.index import SparseIndex

_WORDS = 32  # of 32 columns each, for one program
_ROWS = 16
_MULTIPLE = 128  # columns, the widest tile: words past the capacity are there, with every bit set


@dataclass(frozen=True)
class ColumnTables:
    """What the column kernels read beside q, k and v.

    Attributes:
        columns: int32 (batch, q_heads, capacity).
        words: int32 (batch, q_heads, query blocks, words): bit c % 32 of word c // 32 hides column c.
        q_blocks: int32 (query blocks,).
        before: int32 (batch, q_heads, query blocks), columns before the block's first token.
        upto: int32, likewise, columns that the block reads; 0 where it reads none.
    """

    columns: Tensor
    words: Tensor
    q_blocks: Tensor
    before: Tensor
    upto: Tensor


def column_tables(index: SparseIndex, q_blocks: Tensor) -> ColumnTables:
    """The tables of one call, built on the device."""
    columns, diagonals = index.columns.contiguous(), index.diagonals.contiguous()
    batch, heads, capacity = columns.shape
    rows, numbers = q_blocks.numel(), q_blocks.int()
    words = triton.cdiv(capacity, _MULTIPLE) * _MULTIPLE // 32
    bits = torch.empty(batch, heads, rows, words, dtype=torch.int32, device=columns.device)
    blocks = index.local_blocks(q_blocks)
    _hidden_kernel[(batch * heads, triton.cdiv(words, _WORDS), triton.cdiv(rows, _ROWS))](
        diagonals.view(torch.int8),
        diagonals if blocks is None else blocks,
        columns, numbers, bits, index.num_blocks, capacity, rows, words, 0 if blocks is None else blocks.shape[-1],
        HAS_BLOCKS=blocks is not None, SIZE=index.block_size, WORDS=_WORDS, ROWS=_ROWS,
    )  # fmt: skip
    ends = (torch.stack([numbers, numbers + 1]) * index.block_size).flatten()
    counts = torch.searchsorted(columns, ends.expand(batch, heads, -1).contiguous(), out_int32=True)
    before, upto = counts.unflatten(-1, (2, -1)).unbind(2)
    # Where every block computes its own diagonal tile, columns inside the block are that tile's.
    upto = torch.where(diagonals[..., :1], before, upto)
    return ColumnTables(columns, bits, numbers, before.contiguous(), upto)


@triton.jit(do_not_specialize=["num_blocks", "capacity", "rows", "words", "row_bytes"])
def _hidden_kernel(
    diagonals, blocks, columns, q_blocks, bits, num_blocks, capacity, rows, words, row_bytes,
    HAS_BLOCKS: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 32)
    at = word[:, None] * 32 + lane[None, :]
    column = tl.load(columns + head * capacity + at, mask=at < capacity, other=num_blocks * SIZE)
    key = column // SIZE
    first = tl.program_id(2) * ROWS
    for i in range(first, tl.minimum(first + ROWS, rows)):
        query = tl.load(q_blocks + i)
        seen = query >= key
        hide = tl.load(diagonals + head * num_blocks + (query - key), mask=seen, other=1).to(tl.int32)
        if HAS_BLOCKS:
            row = blocks + (head * rows + i) * row_bytes
            hide |= (tl.load(row + key // 8, mask=seen, other=0).to(tl.int32) >> (key % 8)) & 1
        packed = tl.sum((hide != 0).to(tl.int32) << lane[None, :], 1)
        tl.store(bits + (head * rows + i) * words + word, packed, mask=word < words)
