"""Every attention kernel against the fp64 reference, small, in Triton's interpreter (fp32 and fp16 only:
its bf16 dot is wrong); tests/gpu does the same at size on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mtraining.errors import UserError
from mtraining.kernel import Placement, ReferenceBackend, SparseIndex, select_backend
from mtraining.kernel.triton import hidden as triton_hidden
from mtraining.kernel.triton.backend import TritonBackend
from triton_cases import Case, assert_equal, assert_passes, build, reference, solve, tiles_gradients, whole

STRIPED = {"q_blocks": range(1, 8, 2), "num_blocks": 8}
ZIGZAG = {"q_blocks": (1, 6), "num_blocks": 8, "size": 16}

CASES = {
    "whole": whole(4),
    "mha": whole(3, q_heads=2, kv_heads=2, batch=2),
    "group of 4": whole(3, q_heads=4, kv_heads=1, size=16),
    "tiles smaller than blocks": whole(2, size=128, q_heads=2, columns=70),
    "blocks of 96": whole(2, size=96, q_heads=2, dim=32),
    "head_dim 96": whole(3, dim=96, q_heads=2),
    "head_dim 128": whole(2, dim=128, q_heads=2, size=64),
    "one block": whole(1),
    "one block, no diagonal": whole(1, diagonal_share=0.0),
    "no columns": whole(3, columns=0),
    "every tile": whole(4, diagonal_share=1.0),
    "columns only": whole(4, diagonal_share=0.0, columns=128),
    "block mask": whole(5, size=16, block_share=0.3, diagonal_share=0.2),
    "striped, own keys": Case(k_blocks=range(1, 8, 2), size=16, **STRIPED),
    "striped, earlier rank": Case(k_blocks=range(0, 8, 2), size=16, **STRIPED),
    "striped, later rank": Case(range(0, 8, 2), range(1, 8, 2), 8, size=16),
    "contiguous, earlier rank": Case(range(4, 8), range(0, 4), 8, size=16),
    "contiguous, all masked": Case(range(0, 4), range(4, 8), 8, size=16),
    "zigzag, own keys": Case(k_blocks=(1, 6), **ZIGZAG),
    "zigzag, others": Case(k_blocks=(0, 7), **ZIGZAG),
    "zigzag, block mask": Case(k_blocks=(2, 5), block_share=0.5, **ZIGZAG),
    "not contiguous": whole(3, strided=True, size=16),
}
# Calls with starts: both kinds of lists, both orders of rows, every kind of place in a ring.
WITH_STARTS = {
    "documents at blocks": whole(5, size=16, starts="blocks", batch=2),
    "documents anywhere": whole(5, size=16, starts="anywhere", batch=2),
    "documents of one token": whole(4, size=16, starts="tokens"),
    "a narrow window": whole(4, size=16, starts="narrow", diagonal_share=1.0),
    "a wide window": whole(6, size=16, starts="wide"),
    "a window of two tokens": whole(3, size=16, starts="two", q_heads=2),
    "documents in tiles smaller than blocks": whole(3, size=128, columns=70, starts="anywhere"),
    "a window in tiles smaller than blocks": whole(3, size=128, columns=150, starts="wide"),
    "group of 4": whole(4, q_heads=4, kv_heads=2, size=16, starts="anywhere", batch=2),
    "block mask": whole(5, size=16, block_share=0.4, diagonal_share=0.2, starts="anywhere", batch=2),
    "columns only": whole(5, size=16, diagonal_share=0.0, columns=70, starts="anywhere", batch=2),
    "columns in a window": whole(8, size=16, diagonal_share=0.0, columns=100, starts="wide"),
    "striped, own keys": Case(k_blocks=range(1, 8, 2), size=16, starts="anywhere", **STRIPED),
    "striped, earlier rank": Case(k_blocks=range(0, 8, 2), size=16, starts="wide", **STRIPED),
    "striped, later rank": Case(range(0, 8, 2), range(1, 8, 2), 8, size=16, starts="anywhere"),
    "contiguous, earlier rank": Case(range(4, 8), range(0, 4), 8, size=16, starts="wide"),
    "contiguous, mostly out of reach": Case(
        range(4, 8), range(0, 4), 8, size=16, starts="narrow", diagonal_share=1.0
    ),
    "zigzag, own keys": Case(k_blocks=(1, 6), starts="anywhere", **ZIGZAG),
    "zigzag, others": Case(k_blocks=(0, 7), starts="anywhere", **ZIGZAG),
    "zigzag, block mask": Case(k_blocks=(2, 5), block_share=0.5, starts="wide", **ZIGZAG),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", CASES)
def test_fp32(name: str) -> None:
    problem = build(CASES[name])
    assert_equal(solve(TritonBackend(), problem), reference(problem), 1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", WITH_STARTS)
def test_starts(name: str) -> None:
    problem = build(WITH_STARTS[name])
    assert_equal(solve(TritonBackend(), problem), reference(problem), 1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["whole", "block mask"])
def test_fp16(name: str) -> None:
    problem = build(replace(CASES[name], dtype=torch.float16))
    assert_equal(solve(TritonBackend(), problem), reference(problem), 1e-3)


@pytest.mark.usefixtures("poisoned")
def test_every_kind_of_pass() -> None:
    for backend in (TritonBackend(), ReferenceBackend()):
        for starts in (None, "anywhere"):
            case = whole(3, q_heads=2, size=16, dtype=torch.float16, starts=starts)
            assert_passes(backend, build(case), 1e-3)


def test_same_bits_twice() -> None:
    problem = build(whole(3, q_heads=4, kv_heads=2, size=16))
    (lse, first), (lse_again, second) = (solve(TritonBackend(), problem) for _ in range(2))
    assert torch.equal(lse, lse_again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_merging_and_adding_leave_earlier_results_in_place() -> None:
    """A head that selects nothing keeps the previous (out, lse) bit for bit, and dq gains zero."""
    p = build(whole(3, size=16))
    out, lse = torch.randn(p.q.shape), torch.randn(p.q.shape[0], p.q.shape[2], p.q.shape[1])
    merged, merged_lse = TritonBackend().tiles_forward(
        p.q, p.k, p.v, p.index, p.place, p.scale, out.clone(), lse.clone()
    )
    assert torch.equal(merged[:, :, 0], out[:, :, 0])
    assert torch.equal(merged_lse[:, 0], lse[:, 0])
    assert not torch.equal(merged[:, :, 1], out[:, :, 1])
    dq = torch.randn(p.q.shape)
    grown, *_ = tiles_gradients(
        TritonBackend(), p.dout, p.q, p.k, p.v, lse, lse, p.index, p.place, p.scale, dq.clone()
    )
    assert torch.equal(grown[:, :, 0], dq[:, :, 0])
    assert not torch.equal(grown[:, :, 1], dq[:, :, 1])


def test_dq_of_any_strides() -> None:
    p = build(whole(2, size=16))
    lse, truth = reference(p)
    dq = torch.zeros(*p.q.shape[:2], p.q.shape[3], p.q.shape[2]).transpose(2, 3)
    given = (p.dout, p.q, p.k, p.v, lse.float(), truth["delta"].float(), p.index, p.place, p.scale, dq)
    total, *_ = tiles_gradients(TritonBackend(), *given, columns=(p.ck, p.cv))
    torch.testing.assert_close(total.double(), truth["dq"], rtol=1e-4, atol=1e-5)


def test_unknown_step_gives_the_same_result() -> None:
    """Explicit lists and the Toeplitz walk are two ways through the same tiles."""
    problem = build(CASES["striped, own keys"])
    toeplitz = solve(TritonBackend(), problem)
    assert problem.place.step == (2, 0)
    problem.place = Placement(problem.place.q_blocks, problem.place.k_blocks, problem.place.num_blocks)
    assert_equal(solve(TritonBackend(), problem), toeplitz, 1e-6)


def test_what_it_cannot_serve_is_refused() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="not float64; kernel=reference"):
        select_backend("triton", cpu, torch.float64, 64)
    assert select_backend("triton", cpu, torch.float32, 64).name == "triton"
    p = build(whole(2, size=32))
    small = SparseIndex(p.index.seq_len, 8, p.index.diagonals.repeat(1, 1, 4), p.index.columns)
    with pytest.raises(UserError, match="block_size: kernel=triton needs a multiple of 16 tokens, not 8"):
        TritonBackend().tiles_forward(p.q, p.k, p.v, small, small.placement(), p.scale, None, None)
    with pytest.raises(UserError, match="scale"):
        TritonBackend().tiles_forward(p.q, p.k, p.v, p.index, p.place, -1.0, None, None)


def test_tables_of_columns_are_made_once_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew for another index over the same keys, which must not be taken for it."""
    made: list[SparseIndex] = []
    make = triton_hidden.column_tables
    monkeypatch.setattr(triton_hidden, "column_tables", lambda *a: made.append(a[0]) or make(*a))
    p = build(whole(3, size=16))
    backend, stat = TritonBackend(), torch.zeros(p.q.shape[0], p.q.shape[2], p.q.shape[1])
    other = replace(p.index, diagonals=~p.index.diagonals)
    for index in (p.index, other):
        tiles_gradients(
            backend, p.dout, p.q, p.k, p.v, stat, stat, p.index, p.place, p.scale, None, columns=(p.ck, p.cv)
        )
        backend.columns_backward(p.dout, p.q, p.ck, p.cv, stat, stat, index, p.place.q_blocks, p.scale)
    assert [index is other for index in made] == [False, False, True]
    assert p.ck in triton_hidden._kept  # the other's, till its keys are gone
    ck = p.ck
    p.ck = p.cv
    del ck
    assert len(triton_hidden._kept) == 0


def test_columns_of_one_document_do_not_regroup_the_sums_of_another() -> None:
    """Columns of two documents in one tile; those of the first move, and no bit of the second's gradients does."""
    torch.manual_seed(0)
    seq_len, size, second = 512, 32, 256
    starts = torch.arange(seq_len, dtype=torch.int32)[None] // second * second
    q, dout = (torch.randn(1, seq_len, 1, 64) for _ in range(2))
    lse, delta = torch.randn(1, 1, seq_len) + 3, torch.randn(1, 1, seq_len)
    kept = torch.randn(2, 1, 8, 1, 64)

    def gradients(first: list[int]) -> torch.Tensor:
        columns = torch.tensor([[[*first, 256, 300, 301, 400]]], dtype=torch.int32)
        index = SparseIndex(
            seq_len, size, torch.zeros(1, 1, seq_len // size, dtype=torch.bool), columns, starts=starts
        )
        ck, cv = kept
        blocks = torch.arange(seq_len // size)
        found = TritonBackend().columns_backward(dout, q, ck, cv, lse, delta, index, blocks, 0.125)
        return found[:, :, 4:]

    assert torch.equal(gradients([0, 1, 2, 3]), gradients([200, 201, 202, 203]))
