"""Eager attention over a sparse index: the specification, on any device and in any dtype including fp64.

Multiplies only the tiles that the index selects, so that it is also a usable CPU backend. Query blocks of any batch row
and head that read equally many keys are computed together; no number of one depends on the others. Every other backend
must equal it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, starmap
from typing import NamedTuple

import torch
from torch import Tensor

from mtraining.kernel.backend import Columns, QueryGradient
from mtraining.kernel.index import SparseIndex
from mtraining.kernel.placement import Placement
from mtraining.kernel.reference import columns as compact
from mtraining.kernel.reference.estimate import ReferenceEstimation


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64, everything else accumulates in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Join two partial attentions over disjoint keys; rows with lse = -inf on either or both sides are safe.

    Args:
        out_a, out_b: (batch, rows, heads, head_dim), normalised by their own softmax.
        lse_a, lse_b: (batch, heads, rows), natural log.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    safe = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)  # (-inf) - (-inf) would be NaN
    weight_a = (lse_a - safe).exp().transpose(1, 2)[..., None]
    weight_b = (lse_b - safe).exp().transpose(1, 2)[..., None]
    return out_a * weight_a + out_b * weight_b, lse


_AT_ONCE = 2**20  # numbers of what is computed and held together
_WIDTHS = 16  # query blocks read compact columns in multiples of this, the rest of them hidden


def _by_keys(rows: Tensor, keys: Tensor) -> Tensor:
    """(..., rows, d), (..., keys, d) -> their products (..., rows, keys). No bit depends on where a key stands: MKL on
    AMD's CPUs adds the columns of a product in another order than its last ones, but all of its rows in the same."""
    return (keys @ rows.mT).mT


def _softmax_times(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(..., rows, keys), (..., keys, d) -> out (..., rows, d), lse (..., rows); rows of -inf give 0 and -inf."""
    top = scores.amax(-1, keepdim=True)
    top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ values) / torch.where(total == 0, torch.ones_like(total), total)
    return out, (top + total.log()).squeeze(-1)


def _softmax_gradient(
    scores: Tensor, lse: Tensor, delta: Tensor, dout: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities and score gradients under the *global* lse and delta: both (..., rows, keys)."""
    safe = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    prob = (scores - safe[..., None]).exp_()
    return prob, prob * (_by_keys(dout, values) - delta[..., None])


class _Heads:
    """Per-head views in the accumulation dtype: (batch, heads, blocks, block_size, head_dim), contiguous."""

    def __init__(self, x: Tensor, block_size: int) -> None:
        batch, rows, heads, dim = x.shape
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        x = x.to(accumulation_dtype(x.dtype)).transpose(1, 2).contiguous()
        self.blocks = x.view(batch, heads, rows // block_size, block_size, dim)
        self.flat = x

    def of(self, b: Tensor, h: Tensor, js: Tensor) -> Tensor:
        """Blocks ``js`` (count, blocks) of batch rows and heads (count,), joined: (count, rows, head_dim)."""
        return self.blocks[b[:, None], h[:, None], js].flatten(1, 2)

    def add(self, order: Tensor, b: Tensor, h: Tensor, js: Tensor, part: Tensor) -> None:
        """Have ``part`` (count, rows, head_dim) added to these blocks by `sum`, in the order (count,) of queries."""
        number = (b * self.blocks.shape[1] + h)[:, None] * self.blocks.shape[2] + js
        self._parts.append(
            (order[:, None].expand_as(js).flatten(), number.flatten(), part.view(-1, *self.blocks.shape[3:]))
        )

    def sum(self) -> None:
        """Add what there is, in the order of query blocks: that they were computed together changes no bit."""
        order, number, part = self._parts[0]
        if len(self._parts) > 1:
            order, number, part = (torch.cat(some) for some in zip(*self._parts, strict=True))
            order = order.argsort(stable=True)
            number, part = number[order], part[order]
        self.blocks.flatten(0, 2).index_add_(0, number, part)
        self._parts.clear()

    def to_rows(self) -> Tensor:
        """(batch, rows, heads, head_dim)."""
        return self.flat.transpose(1, 2)


def _key_gradients(k: Tensor, block_size: int) -> _Heads:
    """Zeros for the gradients of keys and of values, side by side: what is added to one is added to the other."""
    return _Heads(k.new_zeros(*k.shape[:-1], 2 * k.shape[-1]), block_size)


def _empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    batch, rows, heads, _ = q.shape
    return torch.zeros_like(q, dtype=dtype), q.new_full((batch, heads, rows), -torch.inf, dtype=dtype)


class ReferenceBackend(ReferenceEstimation):
    """Implements :class:`mtraining.kernel.backend.Backend` in eager PyTorch."""

    name = "reference"

    def row_delta(self, out: Tensor, dout: Tensor) -> Tensor:
        dtype = accumulation_dtype(out.dtype)
        return (out.to(dtype) * dout.to(dtype)).sum(-1).transpose(1, 2)

    def tiles_forward(
        self, q: Tensor, k: Tensor, v: Tensor, index: SparseIndex, placement: Placement, scale: float,
        out: Tensor | None, lse: Tensor | None, *, columns: Columns | None = None, final: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if columns is not None:
            out, lse = _columns_forward(q, *columns, index, placement.q_blocks, scale, out, lse)
        size = index.block_size
        qh, kh, vh = _Heads(q, size), _Heads(k, size), _Heads(v, size)
        new_out, new_lse = _empty_result(q)
        oh, lse_blocks = _Heads(new_out, size), new_lse.unflatten(-1, (-1, size))
        for _, b, h, hk, i, js in chain.from_iterable(_selected_rows(q, k, index, placement)):
            keys, values = kh.of(b, hk, js), vh.of(b, hk, js)
            scores = _masked(_by_keys(qh.blocks[b, h, i], keys) * scale, index, b, placement, i, js)
            oh.blocks[b, h, i], lse_blocks[b, h, i] = _softmax_times(scores, values)
        out, lse = _merged(oh.to_rows(), new_lse, out, lse)
        return out.to(q.dtype) if final else out, lse

    def tiles_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        placement: Placement, scale: float,
    ) -> tuple[Tensor, QueryGradient]:  # fmt: skip
        size = index.block_size
        qh, kh, vh, doh = (_Heads(x, size) for x in (q, k, v, dout))
        dqh, dkvh = _Heads(torch.zeros_like(q), size), _key_gradients(k, size)
        lse_blocks, delta_blocks = lse.unflatten(-1, (-1, size)), delta.unflatten(-1, (-1, size))
        for together in _selected_rows(q, k, index, placement):
            for order, b, h, hk, i, js in together:
                keys, values = kh.of(b, hk, js), vh.of(b, hk, js)
                rows, grad = qh.blocks[b, h, i], doh.blocks[b, h, i]
                scores = _masked(_by_keys(rows, keys) * scale, index, b, placement, i, js)
                prob, dscore = _softmax_gradient(
                    scores, lse_blocks[b, h, i], delta_blocks[b, h, i], grad, values
                )
                dqh.blocks[b, h, i] = dscore @ keys * scale
                dkvh.add(order, b, hk, js, torch.cat((dscore.mT @ rows * scale, prob.mT @ grad), -1))
            dkvh.sum()

        def query_gradient(
            dq: Tensor | None, *, columns: Columns | None = None, final: bool = False
        ) -> Tensor:
            total = dqh.to_rows() if dq is None else dq + dqh.to_rows()
            if columns is not None:
                of_columns = _Heads(torch.zeros_like(q), size)
                for part in chain.from_iterable(
                    _column_gradients(dout, q, *columns, lse, delta, index, placement.q_blocks, scale)
                ):
                    of_columns.blocks[part.b, part.h, part.i] = part.dscore @ part.keys
                total = total + of_columns.to_rows()
            return total.to(q.dtype) if final else total

        return torch.stack(dkvh.to_rows().chunk(2, -1)), query_gradient

    def columns_backward(
        self, dout: Tensor, q: Tensor, ck: Tensor, cv: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        q_blocks: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        dkvh = _key_gradients(ck, 1)
        for together in _column_gradients(dout, q, ck, cv, lse, delta, index, q_blocks, scale):
            for part in together:
                of_both = torch.cat((part.dscore.mT @ part.rows, part.prob.mT @ part.grad), -1)
                dkvh.add(part.order, part.b, part.h, part.seen, of_both)
            dkvh.sum()
        return torch.stack(dkvh.to_rows().chunk(2, -1))

    def gather_columns(self, k: Tensor, v: Tensor, columns: Tensor, slots: Tensor) -> Tensor:
        return compact.gather_columns(k, v, columns, slots)

    def scatter_columns(self, grads: Tensor, columns: Tensor, slots: Tensor, dkv: Tensor) -> None:
        compact.scatter_columns(grads, columns, slots, dkv)


def _columns_forward(
    q: Tensor, ck: Tensor, cv: Tensor, index: SparseIndex, q_blocks: Tensor, scale: float,
    out: Tensor | None, lse: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    size = index.block_size
    qh, kh, vh = _Heads(q, size), _Heads(ck, 1), _Heads(cv, 1)
    new_out, new_lse = _empty_result(q)
    oh, lse_blocks = _Heads(new_out, size), new_lse.unflatten(-1, (-1, size))
    for _, b, h, i, seen, hidden in chain.from_iterable(_column_rows(index, q_blocks, q.shape[-1])):
        keys, values = kh.of(b, h, seen), vh.of(b, h, seen)
        scores = (_by_keys(qh.blocks[b, h, i], keys) * scale).masked_fill_(hidden, -torch.inf)
        oh.blocks[b, h, i], lse_blocks[b, h, i] = _softmax_times(scores, values)
    return _merged(oh.to_rows(), new_lse, out, lse)


class _ColumnGradients(NamedTuple):
    """Of some query blocks: what `_column_rows` yields but for the hidden entries; the keys of these columns, queries,
    gradients of outputs, weights, and gradients of scores."""

    order: Tensor
    b: Tensor
    h: Tensor
    i: Tensor
    seen: Tensor
    keys: Tensor
    rows: Tensor
    grad: Tensor
    prob: Tensor
    dscore: Tensor


def _column_gradients(
    dout: Tensor, q: Tensor, ck: Tensor, cv: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
    q_blocks: Tensor, scale: float,
) -> Iterator[Iterator[_ColumnGradients]]:  # fmt: skip
    size = index.block_size
    qh, doh, kh, vh = _Heads(q, size), _Heads(dout, size), _Heads(ck, 1), _Heads(cv, 1)
    lse_blocks, delta_blocks = lse.unflatten(-1, (-1, size)), delta.unflatten(-1, (-1, size))

    def gradients(
        order: Tensor, b: Tensor, h: Tensor, i: Tensor, seen: Tensor, hidden: Tensor
    ) -> _ColumnGradients:
        keys, values = kh.of(b, h, seen), vh.of(b, h, seen)
        rows, grad = qh.blocks[b, h, i], doh.blocks[b, h, i]
        scores = (_by_keys(rows, keys) * scale).masked_fill_(hidden, -torch.inf)
        prob, dscore = _softmax_gradient(scores, lse_blocks[b, h, i], delta_blocks[b, h, i], grad, values)
        return _ColumnGradients(order, b, h, i, seen, keys, rows, grad, prob, dscore * scale)

    for together in _column_rows(index, q_blocks, q.shape[-1]):
        yield starmap(gradients, together)


def _merged(
    new_out: Tensor, new_lse: Tensor, out: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    return (new_out, new_lse) if out is None or lse is None else merge(out, lse, new_out, new_lse)


def _selected_rows(
    q: Tensor, k: Tensor, index: SparseIndex, placement: Placement
) -> Iterator[Iterator[tuple[Tensor, ...]]]:
    """Query blocks with equally many tiles, as `_equally_many` yields them. Int64: where they stand in the order of
    all, batch row, query head, key head and query block (count,), and key blocks (count, tiles). Blocks are local."""
    group = q.shape[2] // k.shape[2]
    tiles = index.tile_mask(placement.q_blocks, placement.k_blocks)
    widest = max(index.block_size, q.shape[-1])

    def rows(number: int, order: Tensor, b: Tensor, h: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return order, b, h, h // group, i, tiles[b, h, i].nonzero()[:, 1].view(-1, number)

    for together in _equally_many(tiles.sum(-1), index.block_size * widest):
        yield starmap(rows, together)


def _equally_many(
    numbers: Tensor, size: int
) -> Iterator[Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]]:
    """Places (batch row, head, query block) whose number is above 0, in order, as many at a time as `_AT_ONCE` allows.

    Args:
        numbers: int64 (batch, heads, query blocks). size: a place takes so many times its number.

    Yields:
        Of places at a time, each number once: the number, where its places stand in the order of all, and the places.
    """
    flat = numbers.flatten()
    some = flat.nonzero().squeeze(-1)
    takes = (flat[some] * size).cumsum(0)
    begin = 0
    while begin < some.numel():
        before = int(takes[begin - 1]) if begin else 0
        end = max(begin + 1, int(torch.searchsorted(takes, before + _AT_ONCE, right=True)))
        yield _by_number(numbers, some[begin:end])
        begin = end


def _by_number(numbers: Tensor, order: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    found = numbers.flatten()[order]
    for number in found.unique().tolist():
        mine = order[found == number]
        b, h, i = torch.unravel_index(mine, numbers.shape)
        yield number, mine, b, h, i


def _masked(
    scores: Tensor, index: SparseIndex, b: Tensor, placement: Placement, i: Tensor, js: Tensor
) -> Tensor:
    """Mask, in place, the keys that query blocks may not attend among their tiles; only the last tile can hold the
    future."""
    size = index.block_size
    lane = torch.arange(size, device=scores.device)
    rows = placement.q_blocks[i, None] * size + lane
    keys = (placement.k_blocks[js][..., None] * size + lane).flatten(1)
    if index.starts is not None:
        return scores.masked_fill_(_hidden(index, b, rows, keys), -torch.inf)
    scores[..., -size:].masked_fill_(_hidden(index, b, rows, keys[:, -size:]), -torch.inf)
    return scores


def _hidden(index: SparseIndex, b: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """Which keys (count, keys) the rows (count, rows) may not attend: bool (count, rows, keys). Positions are global,
    int64."""
    keys = keys[:, None]
    future = keys > rows[..., None]
    return future if index.starts is None else future | (keys < index.starts[b[:, None], rows][..., None])


def _column_rows(
    index: SparseIndex, q_blocks: Tensor, head_dim: int
) -> Iterator[Iterator[tuple[Tensor, ...]]]:
    """Query blocks that see equally many columns, as `_equally_many` yields them. Int64: where they stand in the order
    of all, batch row, head and query block (count,), and the columns (count, columns) by their places in the compact
    ones; and hidden entries, bool (count, rows, columns).

    Hidden: columns after the row or before its start, columns inside a slash tile that the row's block computes anyway,
    and columns that fill up the width.
    """
    size = index.block_size
    lane = torch.arange(size, device=q_blocks.device)
    columns, heads = index.columns.long(), index.columns.shape[:2]
    ends = torch.searchsorted(columns, ((q_blocks + 1) * size).expand(*heads, -1).contiguous())
    begins = torch.zeros_like(ends)
    if index.starts is not None:
        first = index.starts[:, None, q_blocks * size].long().expand(*heads, -1)
        begins = torch.searchsorted(columns, first.contiguous())
    tiles = index.tile_mask(q_blocks, torch.arange(index.num_blocks, device=q_blocks.device))
    counts = (ends - begins).clamp(min=0)

    def rows(width: int, order: Tensor, b: Tensor, h: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        ahead = torch.arange(width, device=q_blocks.device)
        seen = (begins[b, h, i][:, None] + ahead).clamp(max=columns.shape[-1] - 1)
        positions = columns[b[:, None], h[:, None], seen]
        block = (positions // size).clamp(max=index.num_blocks - 1)
        left_out = tiles[b, h, i].gather(1, block) | (ahead >= counts[b, h, i][:, None])
        hidden = _hidden(index, b, q_blocks[i, None] * size + lane, positions)
        return order, b, h, i, seen, hidden | left_out[:, None]

    widths = (counts + _WIDTHS - 1) // _WIDTHS * _WIDTHS
    for together in _equally_many(widths, max(size, head_dim)):
        yield starmap(rows, together)
