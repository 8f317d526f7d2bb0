"""Random attention problems for the Triton kernels, and their answers from the fp64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtraining.kernel import Backend, Placement, ReferenceBackend, SparseIndex, pack_blocks
from mtraining.kernel.backend import Columns
from mtraining.kernel.placement import progression


@dataclass(frozen=True)
class Case:
    """One problem: ``q_blocks`` and ``k_blocks`` are global block numbers of a sequence of ``num_blocks``; block lists
    are given for the rows of ``q_blocks`` only, as a rank has them. ``starts`` is a key of ``STARTS``."""

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
    starts: str | None = None


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


def _documents(seq_len: int, boundaries: Tensor) -> Tensor:
    """Starts of documents that begin at 0 and at each of the boundaries."""
    begins = torch.zeros(seq_len, dtype=torch.int32)
    begins[boundaries] = boundaries.int()
    return begins.cummax(0).values


def _window(seq_len: int, window: int) -> Tensor:
    return (torch.arange(seq_len, dtype=torch.int32) - window + 1).clamp(min=0)


# of a sequence length and a block size; another draw for each batch row
STARTS: dict[str, Callable[[int, int], Tensor]] = {
    "blocks": lambda n, size: _documents(n, torch.randperm(n // size)[: max(n // size // 2, 1)] * size),
    "anywhere": lambda n, size: _documents(n, torch.randperm(n)[:5]),
    "tokens": lambda n, size: _documents(
        n, torch.cat([torch.arange(n // 3, n // 3 + size + 3), torch.tensor([n - 1])])
    ),
    "narrow": lambda n, size: _window(n, 5),
    "wide": lambda n, size: _window(n, int(torch.randint(size, 2 * size + 9, ()))),
    "two": lambda n, size: _window(n, 2),
}


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
    if case.starts is not None:
        drawn = [STARTS[case.starts](seq_len, case.size) for _ in range(case.batch)]
        index = replace(index, starts=torch.stack(drawn).to(device))
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


def tiles_gradients(
    backend: Backend, *inputs: Any, columns: Columns | None = None, final: bool = False
) -> tuple[Tensor, Tensor]:
    """dq, and the gradients of k and v, of a backward pass over tiles; dq of earlier passes is the last input."""
    *inputs, dq = inputs
    dkv, query_gradient = backend.tiles_backward(*inputs)
    return query_gradient(dq, columns=columns, final=final), dkv


NAMES = ("out", "delta", "dq", "dk", "dv", "dck", "dcv")


def solve(backend: Backend, p: Problem) -> tuple[Tensor, dict[str, Tensor]]:
    """lse, and everything else by name: one pass over tiles and columns, if any, forward and backward."""
    columns = (p.ck, p.cv) if p.index.columns.shape[-1] else None
    out, lse = backend.tiles_forward(p.q, p.k, p.v, p.index, p.place, p.scale, None, None, columns=columns)
    delta = backend.row_delta(out, p.dout)
    dq, (dk, dv) = tiles_gradients(
        backend, p.dout, p.q, p.k, p.v, lse, delta, p.index, p.place, p.scale, None, columns=columns
    )
    if columns is None:
        dck, dcv = (torch.zeros_like(x, dtype=lse.dtype) for x in (p.ck, p.cv))
    else:
        dck, dcv = backend.columns_backward(
            p.dout, p.q, p.ck, p.cv, lse, delta, p.index, p.place.q_blocks, p.scale
        )
    return lse, dict(zip(NAMES, (out, delta, dq, dk, dv, dck, dcv), strict=True))


def assert_passes(backend: Backend, p: Problem, tolerance: float) -> None:
    """Every kind of pass of a ring, with and without columns, first or not, last or not: a final pass rounds the result
    of any other, bit for bit, and one after another gives what the reference's give."""
    q, dout, rest = p.q, p.dout, (p.index, p.place, p.scale)
    pairs = (None, (p.ck, p.cv)) if p.index.columns.shape[-1] else (None,)
    zeros = torch.zeros_like(q, dtype=torch.float32)
    lse_shape = (q.shape[0], q.shape[2], q.shape[1])
    earlier = torch.randn_like(zeros), torch.randn(lse_shape, device=q.device)
    wide, delta = torch.randn(lse_shape, device=q.device) + 8, torch.randn(lse_shape, device=q.device)
    truth = ReferenceBackend()
    exact = [x.double() for x in (q, p.k, p.v, dout)]
    for columns in pairs:
        compact = None if columns is None else (p.ck.double(), p.cv.double())
        for previous in ((None, None), earlier):
            old = [None if x is None else x.clone() for x in (*previous, *previous)]
            out, lse = backend.tiles_forward(q, p.k, p.v, *rest, old[0], old[1], columns=columns)
            last, last_lse = backend.tiles_forward(
                q, p.k, p.v, *rest, old[2], old[3], columns=columns, final=True
            )
            assert last.dtype == q.dtype
            assert torch.equal(last, out.to(q.dtype))
            # Not to the bit: what visits nothing goes through units of log2 and back.
            torch.testing.assert_close(last_lse, lse, rtol=4e-7, atol=1e-7)
            want, want_lse = truth.tiles_forward(
                *exact[:3], *rest, *(None if x is None else x.double() for x in previous), columns=compact
            )
            assert relative_error(out, want) < tolerance
            seen = ~want_lse.isneginf()
            assert torch.equal(seen, ~lse.isneginf())
            assert (lse - want_lse)[seen].abs().max() < 1e-4 if seen.any() else True
        for sum_before in (None, earlier[0]):
            grads = []
            for final in (False, True):
                dq = None if sum_before is None else sum_before.clone()
                grads.append(
                    tiles_gradients(
                        backend, dout, q, p.k, p.v, wide, delta, *rest, dq, columns=columns, final=final
                    )
                )
            assert grads[1][0].dtype == q.dtype
            assert torch.equal(grads[1][0], grads[0][0].to(q.dtype))
            assert all(torch.equal(a, b) for a, b in zip(grads[0][1:], grads[1][1:], strict=True))
            wanted = tiles_gradients(
                truth, exact[3], *exact[:3], wide.double(), delta.double(), *rest,
                None if sum_before is None else sum_before.double(), columns=compact,
            )  # fmt: skip
            for got, want in zip(grads[0], wanted, strict=True):
                assert relative_error(got, want) < tolerance


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
