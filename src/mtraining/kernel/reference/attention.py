"""Eager attention over a sparse index: the specification, on any device and in any dtype including fp64.

Loops over batch, heads and query blocks and multiplies only the tiles that the index selects, so that it is
also a usable CPU backend. Every other backend must equal it.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def _softmax_times(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, keys), (keys, d) -> out (rows, d), lse (rows,); rows of -inf give 0 and -inf."""
    top = scores.amax(-1, keepdim=True)
    top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = (weights @ values) / torch.where(total == 0, torch.ones_like(total), total)
    return out, (top + total.log()).squeeze(-1)


def _softmax_gradient(
    scores: Tensor, lse: Tensor, delta: Tensor, dout: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities and score gradients under the *global* lse and delta: both (rows, keys)."""
    safe = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    prob = (scores - safe[:, None]).exp_()
    return prob, prob * (dout @ values.T - delta[:, None])


class _Heads:
    """Per-head views in the accumulation dtype: (batch, heads, blocks, block_size, head_dim), contiguous."""

    def __init__(self, x: Tensor, block_size: int) -> None:
        batch, rows, heads, dim = x.shape
        x = x.to(accumulation_dtype(x.dtype)).transpose(1, 2).contiguous()
        self.blocks = x.view(batch, heads, rows // block_size, block_size, dim)
        self.flat = x

    def to_rows(self) -> Tensor:
        """(batch, rows, heads, head_dim)."""
        return self.flat.transpose(1, 2)


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
        for b, h, hk, i, js in _selected_rows(q, k, index, placement):
            keys, values = kh.blocks[b, hk, js].flatten(0, 1), vh.blocks[b, hk, js].flatten(0, 1)
            scores = _masked(qh.blocks[b, h, i] @ keys.T * scale, index, b, placement, i, js)
            oh.blocks[b, h, i], lse_blocks[b, h, i] = _softmax_times(scores, values)
        out, lse = _merged(oh.to_rows(), new_lse, out, lse)
        return out.to(q.dtype) if final else out, lse

    def tiles_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        placement: Placement, scale: float,
    ) -> tuple[Tensor, QueryGradient]:  # fmt: skip
        size = index.block_size
        qh, kh, vh, doh = (_Heads(x, size) for x in (q, k, v, dout))
        dqh, dkh, dvh = (_Heads(torch.zeros_like(x), size) for x in (q, k, v))
        lse_blocks, delta_blocks = lse.unflatten(-1, (-1, size)), delta.unflatten(-1, (-1, size))
        for b, h, hk, i, js in _selected_rows(q, k, index, placement):
            keys, values = kh.blocks[b, hk, js].flatten(0, 1), vh.blocks[b, hk, js].flatten(0, 1)
            rows, grad = qh.blocks[b, h, i], doh.blocks[b, h, i]
            scores = _masked(rows @ keys.T * scale, index, b, placement, i, js)
            prob, dscore = _softmax_gradient(scores, lse_blocks[b, h, i], delta_blocks[b, h, i], grad, values)
            dqh.blocks[b, h, i] = dscore @ keys * scale
            dkh.blocks[b, hk].index_add_(0, js, (dscore.T @ rows * scale).unflatten(0, (-1, size)))
            dvh.blocks[b, hk].index_add_(0, js, (prob.T @ grad).unflatten(0, (-1, size)))

        def query_gradient(
            dq: Tensor | None, *, columns: Columns | None = None, final: bool = False
        ) -> Tensor:
            total = dqh.to_rows() if dq is None else dq + dqh.to_rows()
            if columns is not None:
                of_columns = _Heads(torch.zeros_like(q), size)
                for b, h, i, _, keys, _, _, _, dscore in _column_gradients(
                    dout, q, *columns, lse, delta, index, placement.q_blocks, scale
                ):
                    of_columns.blocks[b, h, i] = dscore @ keys
                total = total + of_columns.to_rows()
            return total.to(q.dtype) if final else total

        return torch.stack((dkh.to_rows(), dvh.to_rows())), query_gradient

    def columns_backward(
        self, dout: Tensor, q: Tensor, ck: Tensor, cv: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
        q_blocks: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        dkh, dvh = _Heads(torch.zeros_like(ck), 1), _Heads(torch.zeros_like(cv), 1)
        for b, h, _, seen, _, rows, grad, prob, dscore in _column_gradients(
            dout, q, ck, cv, lse, delta, index, q_blocks, scale
        ):
            dkh.flat[b, h, seen] += dscore.T @ rows
            dvh.flat[b, h, seen] += prob.T @ grad
        return torch.stack((dkh.to_rows(), dvh.to_rows()))

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
    for b, h, i, seen, hidden in _column_rows(index, q_blocks):
        keys, values = kh.flat[b, h, seen], vh.flat[b, h, seen]
        scores = (qh.blocks[b, h, i] @ keys.T * scale).masked_fill_(hidden, -torch.inf)
        oh.blocks[b, h, i], lse_blocks[b, h, i] = _softmax_times(scores, values)
    return _merged(oh.to_rows(), new_lse, out, lse)


def _column_gradients(
    dout: Tensor, q: Tensor, ck: Tensor, cv: Tensor, lse: Tensor, delta: Tensor, index: SparseIndex,
    q_blocks: Tensor, scale: float,
) -> Iterator[tuple[int, int, int, slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Yield (batch, head, query block, columns it can see, their keys, queries, dout, weights, score gradients)."""
    size = index.block_size
    qh, doh, kh, vh = _Heads(q, size), _Heads(dout, size), _Heads(ck, 1), _Heads(cv, 1)
    lse_blocks, delta_blocks = lse.unflatten(-1, (-1, size)), delta.unflatten(-1, (-1, size))
    for b, h, i, seen, hidden in _column_rows(index, q_blocks):
        keys, values = kh.flat[b, h, seen], vh.flat[b, h, seen]
        rows, grad = qh.blocks[b, h, i], doh.blocks[b, h, i]
        scores = (rows @ keys.T * scale).masked_fill_(hidden, -torch.inf)
        prob, dscore = _softmax_gradient(scores, lse_blocks[b, h, i], delta_blocks[b, h, i], grad, values)
        yield b, h, i, seen, keys, rows, grad, prob, dscore * scale


def _merged(
    new_out: Tensor, new_lse: Tensor, out: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    return (new_out, new_lse) if out is None or lse is None else merge(out, lse, new_out, new_lse)


def _selected_rows(
    q: Tensor, k: Tensor, index: SparseIndex, placement: Placement
) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """Yield (batch, q_head, kv_head, query block, key blocks) for rows with any tile; blocks are local."""
    batch, _, q_heads, _ = q.shape
    group = q_heads // k.shape[2]
    tiles = index.tile_mask(placement.q_blocks, placement.k_blocks)
    for b in range(batch):
        for h in range(q_heads):
            for i, row in enumerate(tiles[b, h].unbind(0)):
                js = row.nonzero().squeeze(-1)
                if js.numel():
                    yield b, h, h // group, i, js


def _masked(scores: Tensor, index: SparseIndex, b: int, placement: Placement, i: int, js: Tensor) -> Tensor:
    """Mask, in place, the keys that a query block may not attend among its tiles; only the last can hold the future."""
    size = index.block_size
    lane = torch.arange(size, device=scores.device)
    rows = placement.q_blocks[i] * size + lane
    keys = (placement.k_blocks[js, None] * size + lane).flatten()
    if index.starts is not None:
        return scores.masked_fill_(_hidden(index, b, rows, keys), -torch.inf)
    scores[:, -size:].masked_fill_(_hidden(index, b, rows, keys[-size:]), -torch.inf)
    return scores


def _hidden(index: SparseIndex, b: int, rows: Tensor, keys: Tensor) -> Tensor:
    """Which keys the rows may not attend: bool (rows, keys). Positions are global, int64."""
    future = keys > rows[:, None]
    return future if index.starts is None else future | (keys < index.starts[b, rows, None])


def _column_rows(index: SparseIndex, q_blocks: Tensor) -> Iterator[tuple[int, int, int, slice, Tensor]]:
    """Yield (batch, head, query block, columns it can see, hidden entries) for query blocks that see any column.

    Hidden: columns after the row or before its start, and columns inside a slash tile that the row's block computes
    anyway.
    """
    size = index.block_size
    lane = torch.arange(size, device=q_blocks.device)
    columns, heads = index.columns.long(), index.columns.shape[:2]
    ends = torch.searchsorted(columns, ((q_blocks + 1) * size).expand(*heads, -1).contiguous())
    begins = torch.zeros_like(ends)
    if index.starts is not None:
        first = index.starts[:, None, q_blocks * size].long().expand(*heads, -1)
        begins = torch.searchsorted(columns, first.contiguous())
    runs = torch.stack([begins, ends], -1).tolist()
    tiles = index.tile_mask(q_blocks, torch.arange(index.num_blocks, device=q_blocks.device))
    for b in range(heads[0]):
        for h in range(heads[1]):
            for i, (begin, end) in enumerate(runs[b][h]):
                if begin < end:
                    seen = columns[b, h, begin:end]
                    owned = tiles[b, h, i, seen // size]
                    hidden = _hidden(index, b, q_blocks[i] * size + lane, seen)
                    yield b, h, i, slice(begin, end), hidden | owned[None, :]
