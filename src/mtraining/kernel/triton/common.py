"""What every attention kernel shares: how tensors are passed, tile loads, the rows of the index, softmax steps.

A kernel takes each tensor and its strides as one :class:`Strided`, and each group of lists as one named tuple. Triton
passes a tuple's members one by one, so a bundle costs nothing when the kernel runs.

Scores are kept in units of log2 inside the kernels, because ``exp2`` is the hardware's exponential. They are converted
where the natural-log lse is read or written. ``scale`` multiplies after the dot product, in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Strided(NamedTuple):
    """A tensor (batch, rows, heads, head_dim) with unit stride along head_dim, and its other strides in elements."""

    ptr: Any
    batch: Any
    row: Any
    head: Any


class KeyGradients(NamedTuple):
    """dk and dv (splits * batch, keys, heads, head_dim), which have the same strides."""

    dk: Any
    dv: Any
    batch: Any
    row: Any
    head: Any


class RowLists(NamedTuple):
    """The lists of slash tiles that a kernel reads, one a row of blocks: pointers of ``TileLists`` (triton/lists.py).

    Rows are query blocks in query-major kernels, and key blocks in key-major ones. ``reach`` is None, and then nothing
    of it is compiled, or a bound in local positions for each token of the rows (``TileLists.reach``).
    """

    entries: Any
    bounds: Any
    row_blocks: Any
    col_blocks: Any
    reach: Any


class TileRow(NamedTuple):
    """The slash tiles of one row of blocks, as :func:`tile_row` finds them.

    ``entries[lo]`` to ``entries[hi - 1]`` are its tiles; :func:`tile_slot` reads an entry with ``origin``. ``own`` is 1
    if the first entry is the tile on the causal diagonal, else 0.
    """

    entries: Any
    lo: Any
    hi: Any
    origin: Any
    own: Any


def strided(x: Tensor, *, fixed_row: bool = True) -> Strided:
    """``x`` as kernels take it; ``fixed_row``: the compiler knows the stride from one row to the next."""
    batch, row, head, unit = x.stride()
    assert unit == 1, "head_dim must be the innermost dimension"
    return Strided(x, batch, tl.constexpr(row) if fixed_row else row, head)


def key_gradients(dkv: Tensor) -> KeyGradients:
    """dk and dv, stacked (2, batch, keys, heads, head_dim), as kernels take them."""
    return KeyGradients(dkv[0], dkv[1], dkv.stride(1), tl.constexpr(dkv.stride(2)), dkv.stride(3))


@triton.jit
def start_of_head(x: Strided, batch, head):
    """Address of a head's first row."""
    return x.ptr + batch * x.batch + head * x.head


@triton.jit
def start_of_row(x: Strided, batch, head, row):
    """Address of a head's given row."""
    return x.ptr + batch * x.batch + head * x.head + row * x.row


@triton.jit
def tile_offsets(stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of a (ROWS, BLOCK_D) tile from its first element; rows of a tile lie within 2^31 elements."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_tile(base, offsets, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile whose rows are all there; lanes past the head dimension are zero."""
    if HEAD_DIM == BLOCK_D:
        tile = tl.load(base + offsets)
    else:
        tile = tl.load(base + offsets, mask=tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM, other=0.0)
    return tile


@triton.jit
def load_tile_rows(base, offsets, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of which only ``rows`` rows are there; the others are zero."""
    there = tl.arange(0, offsets.shape[0])[:, None] < rows
    return tl.load(base + offsets, mask=there & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def store_tile(base, offsets, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    if HEAD_DIM == BLOCK_D:
        tl.store(base + offsets, tile)
    else:
        tl.store(base + offsets, tile, mask=tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)


@triton.jit
def store_tile_rows(base, offsets, tile, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    there = tl.arange(0, offsets.shape[0])[:, None] < rows
    tl.store(base + offsets, tile, mask=there & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM))


@triton.jit
def load_lse2(ptr):
    """Global log-sum-exp in units of log2; rows that see nothing get 0, so that no difference becomes NaN."""
    lse = tl.load(ptr)
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)


@triton.jit
def tile_row(
    lists: RowLists, n_rows, n_cols, limit, diagonal, bh, i, TOEPLITZ: tl.constexpr, KEY_MAJOR: tl.constexpr
):
    """The :class:`TileRow` of row ``i`` of head ``bh``; triton/lists.py has the two kinds of lists.

    ``limit``: blocks that the row may visit, counted from its far end in a Toeplitz list: ``n_cols`` for all of them.
    """
    if TOEPLITZ:
        pitch = n_rows + n_cols
        low = n_rows - 1 - i if KEY_MAJOR else i
        row = lists.entries + bh * pitch
        lo = tl.load(lists.bounds + bh * pitch + low)
        hi = tl.load(lists.bounds + bh * pitch + low + limit)
        origin = i - (n_rows - 1) if KEY_MAJOR else i + n_cols - 1
        first = tl.load(row + lo, mask=hi > lo, other=-2)
        own = (first == diagonal).to(tl.int32)
    else:
        row = lists.entries + (bh * n_rows + i) * n_cols
        lo = 0
        hi = tl.load(lists.bounds + bh * n_rows + i)
        origin = 0
        first = tl.load(row, mask=hi > 0, other=0)
        same = tl.load(lists.row_blocks + i) == tl.load(lists.col_blocks + first)
        own = (same & (hi > 0)).to(tl.int32)
    return TileRow(row, lo, hi, origin, own)


@triton.jit
def tile_slot(entry, origin, TOEPLITZ: tl.constexpr, KEY_MAJOR: tl.constexpr):
    """Local block that a list entry stands for."""
    if TOEPLITZ:
        slot = origin + entry if KEY_MAJOR else origin - entry
    else:
        slot = entry
    return slot.to(tl.int64)


@triton.jit
def tile_place(t, row: TileRow, SUB: tl.constexpr):
    """Place in its list of the tile that step ``t`` of a row visits, SUB steps a tile.

    The tile on the diagonal is first in the list and is visited last. One step past the end is safe to read too.
    """
    place = row.lo + row.own + t // SUB
    return tl.where(place < row.hi, place, row.lo)


@triton.jit
def softmax_step(acc, top, total, scores, v, scale_log2, GUARD: tl.constexpr, PRECISION: tl.constexpr):
    """Fold one tile of raw scores and its values into the running (acc, top, total).

    acc [BLOCK_M, BLOCK_D], top and total [BLOCK_M], scores [BLOCK_M, BLOCK_N], v [BLOCK_N, BLOCK_D].

    GUARD: the tile may be masked (-inf) throughout a row, so that ``top`` may still be -inf afterwards.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    safe = tl.where(new_top == float("-inf"), 0.0, new_top) if GUARD else new_top
    prob = tl.exp2(scores * scale_log2 - safe[:, None])
    alpha = tl.exp2(top - safe)
    total = total * alpha + tl.sum(prob, 1)
    acc = tl.dot(prob.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def load_partial(
    out_base, out_offsets, lse_ptr, HAS_PREV: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The previous partial result as the state of a running softmax: merging is going on from it."""
    if HAS_PREV:
        acc = load_tile(out_base, out_offsets, HEAD_DIM, BLOCK_D)
        top = tl.load(lse_ptr) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    return acc, top, total


@triton.jit
def store_partial(
    out_base, out_offsets, lse_ptr, acc, top, total, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Normalise and write (out, lse); rows that saw nothing give 0 and -inf."""
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_tile(out_base, out_offsets, acc, HEAD_DIM, BLOCK_D)
    lse = (top + tl.log2(tl.where(empty, 1.0, total))) * LN2
    tl.store(lse_ptr, tl.where(empty, float("-inf"), lse))


@triton.jit
def query_gradient_step(dq, scores, dout, k, v, lse2, delta, scale_log2, PRECISION: tl.constexpr):
    """Query-major: add one tile's share (without the factor ``scale``) to dq; hidden scores are -inf.

    dq and dout [BLOCK_M, BLOCK_D], scores [BLOCK_M, BLOCK_N], k and v [BLOCK_N, BLOCK_D], lse2 and delta [BLOCK_M].
    """
    prob = tl.exp2(scores * scale_log2 - lse2[:, None])
    dprob = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dscore = prob * (dprob - delta[:, None])
    return tl.dot(dscore.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def key_gradient_step(dk, dv, scores, v, q, dout, lse2, delta, scale_log2, PRECISION: tl.constexpr):
    """Key-major: add one tile's share to dk (without the factor ``scale``) and dv. Scores are transposed.

    dk, dv and v [BLOCK_N, BLOCK_D], scores [BLOCK_N, BLOCK_M], q and dout [BLOCK_M, BLOCK_D], lse2 and delta [BLOCK_M].
    """
    prob = tl.exp2(scores * scale_log2 - lse2[None, :])
    dv = tl.dot(prob.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dprob = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dscore = prob * (dprob - delta[None, :])
    dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv
