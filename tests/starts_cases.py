"""Starts of many kinds, a plain softmax under them that shares no code with the project, and the reference results."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtraining.kernel import ReferenceBackend, SparseIndex
from triton_cases import tiles_gradients


def of_documents(*rows: Sequence[int]) -> Tensor:
    """int32 (batch, seq_len) from the lengths of each row's documents."""
    found = []
    for lengths in rows:
        begin, starts = 0, []
        for length in lengths:
            starts += [begin] * length
            begin += length
        found.append(starts)
    return torch.tensor(found, dtype=torch.int32)


def of_window(seq_len: int, window: int, batch: int = 1) -> Tensor:
    return torch.tensor([[max(q - window + 1, 0) for q in range(seq_len)]] * batch, dtype=torch.int32)


def of_chunks(seq_len: int, chunk: int, batch: int = 1) -> Tensor:
    return torch.tensor([[q // chunk * chunk for q in range(seq_len)]] * batch, dtype=torch.int32)


# Two rows of 128 tokens each, for blocks of 8.
STARTS: dict[str, Tensor] = {
    "documents at blocks": of_documents([32, 8, 64, 24], [8, 8, 8, 104]),
    "documents anywhere": of_documents([31, 2, 70, 25], [128]),
    "documents of one token": of_documents([1, 1, 1, 45, 1, 78, 1], [1] * 128),
    "a document over several ranks": of_documents([13, 110, 5], [5, 9, 114]),
    "a window of a few tokens": of_window(128, 5, 2),
    "a window of many blocks": of_window(128, 45, 2),
    "a window of one token": of_window(128, 1, 2),
    "chunks": of_chunks(128, 24, 2),
    "documents and a window": torch.maximum(of_documents([40, 88], [77, 3, 48]), of_window(128, 19, 2)),
}


def allowed(starts: Tensor) -> Tensor:
    """bool (batch, 1, seq_len, seq_len): the keys that causality and the starts leave to each query."""
    seq_len = starts.shape[1]
    mask = torch.zeros(starts.shape[0], 1, seq_len, seq_len, dtype=torch.bool)
    for b, row in enumerate(starts.tolist()):
        for q, first in enumerate(row):
            mask[b, 0, q, first : q + 1] = True
    return mask


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """out like q and lse (batch, heads, rows): plain softmax attention under a boolean mask (batch, heads, q, k)."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = (q.transpose(1, 2) @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(
        ~mask, -torch.inf
    )
    seen = mask.any(-1)
    weights = torch.where(seen[..., None], scores, 0.0).softmax(-1) * seen[..., None]
    return (weights @ values).transpose(1, 2), scores.logsumexp(-1)


def run_reference(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, index: SparseIndex) -> list[Tensor]:
    """out, lse, dq, dk, dv of tiles and columns by the reference."""
    backend, place, scale = ReferenceBackend(), index.placement(), q.shape[-1] ** -0.5
    slots = torch.arange(index.seq_len)
    ck, cv = backend.gather_columns(k, v, index.columns, slots)
    out, lse = backend.tiles_forward(q, k, v, index, place, scale, None, None, columns=(ck, cv))
    delta = backend.row_delta(out, dout)
    dq, dkv = tiles_gradients(backend, dout, q, k, v, lse, delta, index, place, scale, None, columns=(ck, cv))
    grads = backend.columns_backward(dout, q, ck, cv, lse, delta, index, place.q_blocks, scale)
    backend.scatter_columns(grads, index.columns, slots, dkv)
    return [out, lse, dq, *dkv]
