"""The gate before every number: a kernel that is wrong is not timed.

Whole results on a shortened sequence against the eager fp64 reference, with poisoned uninitialised memory; then sampled
rows and keys at full size against sums in fp64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mtraining.bench.attention.problem import Layer, Problem
from mtraining.kernel import ReferenceBackend, SparseIndex

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5, torch.float64: 1e-10}
_HEADS, _ROWS, _KEYS = 3, 16, 4


class GateError(AssertionError):
    """A kernel's result differs from the reference."""


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """While active ``torch.empty`` hands out NaN, or a number far out of range, so that an entry nobody wrote shows."""
    plain: Any = torch.empty

    def poison(*args: Any, **options: Any) -> Tensor:
        x = plain(*args, **options)
        if x.is_floating_point():
            return x.fill_(torch.nan)
        return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max // 2)

    torch.empty = poison
    try:
        yield
    finally:
        torch.empty = plain


def check_whole(layer: Layer) -> None:
    """Everything a layer returns against the fp64 reference.

    Raises:
        GateError: naming the result and its error.
    """
    p = layer.p
    double = replace(p, q=p.q.double(), k=p.k.double(), v=p.v.double(), dout=p.dout.double())
    truth = Layer(ReferenceBackend(), double)
    true_out, true_lse = truth.forward()
    with poisoned_memory():
        out, lse = layer.forward()
        grads = layer.backward(out, lse)
    tolerance = TOLERANCE[p.q.dtype]
    _compare("out", out, true_out, tolerance)
    _compare_lse(lse, true_lse)
    for name, got, want in zip(("dq", "dk", "dv"), grads, truth.backward(true_out, true_lse), strict=True):
        _compare(name, got, want, tolerance)


def check_sampled(
    p: Problem, out: Tensor, lse: Tensor | None, grads: tuple[Tensor, Tensor, Tensor], seed: int = 0
) -> None:
    """Random rows of out, lse and dq, and random keys of dk and dv, at full size.

    Keys are checked with the lse and out of the sampled kernel itself (recomputing every row would cost as much as
    dense attention); without ``lse`` (dense competitors) they are left out.

    Raises:
        GateError: naming the result and its error.
    """
    generator = torch.Generator().manual_seed(seed)
    _, seq_len, q_heads, _ = p.q.shape
    group, tolerance = q_heads // p.k.shape[2], TOLERANCE[p.q.dtype]
    for head in torch.randperm(q_heads, generator=generator)[:_HEADS].tolist():
        rows = torch.randint(seq_len, (_ROWS,), generator=generator).to(p.q.device)
        rows[:2] = torch.tensor([0, seq_len - 1], device=rows.device)
        keys, values = p.k[0, :, head // group].double(), p.v[0, :, head // group].double()
        mask = rows_mask(p.index, head, rows)
        scores = (p.q[0, rows, head].double() @ keys.T * p.scale).masked_fill(~mask, -torch.inf)
        true_lse = scores.logsumexp(-1)
        prob = scores.softmax(-1)
        true_out, dout = prob @ values, p.dout[0, rows, head].double()
        dscore = prob * (dout @ values.T - (true_out * dout).sum(-1, keepdim=True)) * p.scale
        _compare("sampled rows of out", out[0, rows, head], true_out, 2 * tolerance)
        _compare("sampled rows of dq", grads[0][0, rows, head], dscore @ keys, 2 * tolerance)
        if lse is not None:
            _compare_lse(lse[0, head, rows], true_lse)
    if lse is not None:
        for kv_head in torch.randperm(p.k.shape[2], generator=generator)[:_HEADS].tolist():
            _check_keys(p, kv_head, out, lse, grads, generator)


def _check_keys(
    p: Problem, kv_head: int, out: Tensor, lse: Tensor, grads: tuple[Tensor, Tensor, Tensor], generator: torch.Generator
) -> None:  # fmt: skip
    seq_len, group = p.q.shape[1], p.q.shape[2] // p.k.shape[2]
    keys = torch.randint(seq_len, (_KEYS,), generator=generator).to(p.q.device)
    columns = p.index.columns[0, kv_head * group]
    if columns.numel():
        keys[0] = columns[0].clamp(max=seq_len - 1)  # a column, which a random key hardly ever is
    k, v = p.k[0, keys, kv_head].double(), p.v[0, keys, kv_head].double()
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for head in range(kv_head * group, (kv_head + 1) * group):
        q, dout = p.q[0, :, head].double(), p.dout[0, :, head].double()
        mask = keys_mask(p.index, head, keys)
        prob = ((q @ k.T * p.scale) - lse[0, head].double()[:, None]).exp() * mask
        delta = (out[0, :, head].double() * dout).sum(-1, keepdim=True)
        dk += (prob * (dout @ v.T - delta) * p.scale).T @ q
        dv += prob.T @ dout
    tolerance = 2 * TOLERANCE[p.q.dtype]
    _compare("sampled keys of dk", grads[1][0, keys, kv_head], dk, tolerance)
    _compare("sampled keys of dv", grads[2][0, keys, kv_head], dv, tolerance)


def rows_mask(index: SparseIndex, head: int, rows: Tensor) -> Tensor:
    """What the given query rows of batch row 0 see: bool (rows, seq_len)."""
    token = torch.arange(index.seq_len, device=rows.device)
    return _entries(index, head, rows[:, None], token[None, :])


def keys_mask(index: SparseIndex, head: int, keys: Tensor) -> Tensor:
    """Which queries of batch row 0 see the given keys: bool (seq_len, keys)."""
    token = torch.arange(index.seq_len, device=keys.device)
    return _entries(index, head, token[:, None], keys[None, :])


def _entries(index: SparseIndex, head: int, query: Tensor, key: Tensor) -> Tensor:
    distance = query // index.block_size - key // index.block_size
    is_column = torch.zeros(index.seq_len + 1, dtype=torch.bool, device=query.device)
    is_column[index.columns[0, head].long()] = True
    entries = (index.diagonals[0, head][distance.clamp(min=0)] | is_column[key]) & (query >= key)
    return entries if index.starts is None else entries & (key >= index.starts[0, query])


def _compare(name: str, got: Tensor, truth: Tensor, tolerance: float) -> None:
    norm = truth.double().norm().item()
    error = (got.double() - truth.double()).norm().item() / (norm or 1.0)
    if not error <= tolerance:  # NaN as well
        raise GateError(f"{name}: relative error {error:.1e}, at most {tolerance:.0e} is allowed")


def _compare_lse(got: Tensor, truth: Tensor, tolerance: float = 1e-5) -> None:
    seen = ~truth.isneginf()
    if not torch.equal(got.isneginf(), ~seen):
        raise GateError("lse: rows that see nothing differ from the reference's")
    error = (got.double() - truth.double())[seen].abs().max().item() if bool(seen.any()) else 0.0
    if not error <= tolerance:
        raise GateError(f"lse: error {error:.1e}, at most {tolerance:.0e} is allowed")
