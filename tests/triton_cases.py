"""Random attention problems for the Triton kernels, and their answers from the fp64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtraining.kernel import Backend, Placement, ReferenceBackend, SparseIndex, pack_blocks
from mtraining.kernel.placement import progression


@dataclass(frozen=True)
class Case:
    """One problem: ``q_blocks`` and ``k_blocks`` are global block numbers of a sequence of ``num_blocks``; block lists
    are given for the rows of ``q_blocks`` only, as a rank has them."""

    q_blocks: Sequence[int]
    k_blocks: Sequence[int]
    num_blocks: int
    size: int = 32
    q_heads: int = 3
    kv_heads: int = 1
    dim: int = 64
    batch: int = 1
    columns: int = 20
    diagonal_share: float = 0.5
    block_share: float | None = None
    dtype: torch.dtype = torch.float32
    strided: bool = False


def whole(num_blocks: int, **options: object) -> Case:
    return Case(range(num_blocks), range(num_blocks), num_blocks, **options)  # type: ignore[arg-type]


@dataclass
class Problem:
    index: SparseIndex
    place: Placement
    q: Tensor
    k: Tensor
    v: Tensor
    ck: Tensor
    cv: Tensor
    dout: Tensor

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def doubled(self) -> Problem:
        tensors = (self.q, self.k, self.v, self.ck, self.cv, self.dout)
        return Problem(self.index, self.place, *(x.double() for x in tensors))


def build(case: Case, device: str = "cpu") -> Problem:
    """Head 0 of batch row 0 selects nothing, the last one has no columns; the rest is random, not always with bit 0."""
    n, heads = case.num_blocks, (case.batch, case.q_heads)
    seq_len = n * case.size
    diagonals = torch.rand(*heads, n) < case.diagonal_share
    columns = torch.rand(*heads, seq_len).topk(min(case.columns, seq_len), -1).indices
    columns = torch.where(torch.rand(columns.shape) < 0.8, columns, seq_len)
    blocks = None if case.block_share is None else torch.rand(*heads, n, n) < case.block_share
    columns[-1, -1] = seq_len
    if case.q_heads > 1:
        diagonals[0, 0], columns[0, 0] = False, seq_len
        if blocks is not None:
            blocks[0, 0] = False
    q_blocks, k_blocks = torch.tensor(case.q_blocks), torch.tensor(case.k_blocks)
    index = SparseIndex(seq_len, case.size, diagonals.to(device), columns.sort().values.int().to(device))
    if blocks is not None:
        rows = None if q_blocks.numel() == n else q_blocks.to(device)
        index = replace(index, blocks=pack_blocks(blocks[:, :, q_blocks]).to(device), block_rows=rows)
    place = Placement(q_blocks.to(device), k_blocks.to(device), n, progression(q_blocks, k_blocks))

    def tensor(length: int, count: int) -> Tensor:
        if case.strided:  # heads before rows, and head_dim not the innermost
            x = torch.randn(case.batch, case.dim, count, length).permute(0, 3, 2, 1)
        else:
            x = torch.randn(case.batch, length, count, case.dim)
        return x.to(device, case.dtype)

    rows, keys = len(case.q_blocks) * case.size, len(case.k_blocks) * case.size
    capacity = columns.shape[-1]
    return Problem(
        index, place, tensor(rows, case.q_heads), tensor(keys, case.kv_heads), tensor(keys, case.kv_heads),
        tensor(capacity, case.q_heads), tensor(capacity, case.q_heads), tensor(rows, case.q_heads),
    )  # fmt: skip


NAMES = ("out", "delta", "dq", "dk", "dv", "dck", "dcv")


def solve(backend: Backend, p: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """lse, and everything else by name: columns, if any, then tiles merged into them, then both backward passes."""
    blocks, out, lse = p.place.q_blocks, None, None
    if p.index.columns.shape[-1]:
        out, lse = backend.columns_forward(p.q, p.ck, p.cv, p.index, blocks, p.scale, None, None)
    out, lse = backend.tiles_forward(p.q, p.k, p.v, p.index, p.place, p.scale, out, lse)
    delta = backend.row_delta(out, p.dout)
    dq = torch.zeros_like(p.q, dtype=lse.dtype)
    dk, dv = backend.tiles_backward(p.dout, p.q, p.k, p.v, lse, delta, p.index, p.place, p.scale, dq)
    dck, dcv = backend.columns_backward(p.dout, p.q, p.ck, p.cv, lse, delta, p.index, blocks, p.scale, dq)
    return lse, dict(zip(NAMES, (out, delta, dq, dk, dv, dck, dcv), strict=True))


def assert_ends(backend: Backend, p: Problem) -> None:
    """A final pass rounds the result of any other, and a fresh one writes what another adds to zeros, bit for bit."""
    blocks, forward, backward = p.place.q_blocks, backend.columns_forward, backend.columns_backward
    passes = [
        (backend.tiles_forward, backend.tiles_backward, (p.k, p.v), (p.index, p.place, p.scale)),
        (forward, backward, (p.ck, p.cv), (p.index, blocks, p.scale)),
    ]
    before = forward(p.q, p.ck, p.cv, p.index, blocks, p.scale, None, None)
    for attend, differentiate, keys, rest in passes:
        for previous in ((None, None), before):
            out, lse = attend(p.q, *keys, *rest, *(x if x is None else x.clone() for x in previous))
            last, last_lse = attend(
                p.q, *keys, *rest, *(x if x is None else x.clone() for x in previous), final=True
            )
            assert last.dtype == p.q.dtype
            assert torch.equal(last, out.to(p.q.dtype))
            assert torch.equal(last_lse, lse)
        delta = backend.row_delta(out, p.dout)
        zeros = torch.zeros_like(p.q, dtype=lse.dtype)
        nans = torch.full_like(zeros, torch.nan)
        differentiate(p.dout, p.q, *keys, lse, delta, *rest, zeros)
        differentiate(p.dout, p.q, *keys, lse, delta, *rest, nans, fresh=True)
        assert torch.equal(zeros, nans)


def reference(p: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    return solve(ReferenceBackend(), p.doubled())


def relative_error(x: Tensor, truth: Tensor) -> float:
    """||x - truth|| / ||truth||; the plain norm of x where truth is zero. NaN stays NaN, which no bound passes."""
    size = truth.double().norm().item()
    return (x.double() - truth.double()).norm().item() / (size or 1.0)


def assert_equal(
    got: tuple[Tensor, dict[str, Tensor]], truth: tuple[Tensor, dict[str, Tensor]], tolerance: float,
    lse_tolerance: float = 1e-5,
) -> None:  # fmt: skip
    lse, true_lse = got[0].double(), truth[0].double()
    assert torch.equal(lse.isneginf(), true_lse.isneginf())
    seen = ~true_lse.isneginf()
    if seen.any():
        assert (lse - true_lse)[seen].abs().max().item() <= lse_tolerance
    for name in NAMES:
        error = relative_error(got[1][name], truth[1][name])
        assert error <= tolerance, f"{name}: relative error {error:.2e} against {tolerance:.0e}"
