"""The Triton attention kernels on a GPU against the fp64 reference, in the dtypes and sizes that are trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library_warnings import SYNC_CHECKS
from mtraining.kernel import Placement, ReferenceBackend, SparseIndex, choice, select_backend
from mtraining.kernel.hopper import backend as hopper_backend
from mtraining.kernel.hopper.backend import HopperBackend, unsupported
from mtraining.kernel.triton.backend import TritonBackend
from triton_cases import (
    Case,
    assert_equal,
    assert_passes,
    build,
    reference,
    relative_error,
    solve,
    tiles_gradients,
    whole,
)

pytestmark = pytest.mark.gpu

BF16 = {"size": 128, "dtype": torch.bfloat16, "dim": 128}
CASES = {
    "group of 4": whole(9, q_heads=8, kv_heads=2, columns=300, **BF16),
    "group of 3": whole(6, q_heads=9, kv_heads=3, columns=100, **BF16),
    "mha, batch": whole(5, q_heads=3, kv_heads=3, batch=2, columns=128, **BF16),
    "one block": whole(1, q_heads=2, **BF16),
    "no tile at all": whole(3, q_heads=2, diagonal_share=0.0, columns=128, **BF16),
    "every tile": whole(8, q_heads=2, diagonal_share=1.0, columns=0, **BF16),
    "every column": whole(4, q_heads=2, diagonal_share=0.0, columns=512, **BF16),
    "block mask": whole(8, q_heads=4, block_share=0.4, diagonal_share=0.2, **BF16),
    "striped, own keys": Case(range(1, 16, 2), range(1, 16, 2), 16, q_heads=4, columns=256, **BF16),
    "striped, earlier rank": Case(range(1, 16, 2), range(0, 16, 2), 16, q_heads=4, **BF16),
    "striped, later rank": Case(range(0, 16, 2), range(1, 16, 2), 16, q_heads=4, **BF16),
    "zigzag, own keys": Case((2, 3, 8, 9), (2, 3, 8, 9), 12, q_heads=2, **BF16),
    "zigzag, others": Case((2, 3, 8, 9), (0, 1, 10, 11), 12, q_heads=2, **BF16),
    "all masked": Case((0, 1), (2, 3), 4, q_heads=2, **BF16),
    "not contiguous": whole(4, q_heads=2, strided=True, **BF16),
    "blocks of 64": whole(9, size=64, q_heads=2, dtype=torch.bfloat16, columns=100),
    "blocks of 16": whole(20, size=16, q_heads=2, dtype=torch.bfloat16, columns=100),
    "blocks of 96": whole(5, size=96, q_heads=2, dtype=torch.bfloat16, columns=100),
    "documents at blocks": whole(9, q_heads=8, kv_heads=2, columns=300, starts="blocks", batch=2, **BF16),
    "documents anywhere": whole(9, q_heads=8, kv_heads=2, columns=300, starts="anywhere", batch=2, **BF16),
    "documents of one token": whole(6, q_heads=4, columns=300, starts="tokens", diagonal_share=1.0, **BF16),
    "a narrow window": whole(6, q_heads=4, columns=0, starts="narrow", diagonal_share=1.0, **BF16),
    "a wide window": whole(12, q_heads=4, columns=0, starts="wide", diagonal_share=1.0, **BF16),
    "columns in a window": whole(9, q_heads=4, columns=1152, starts="wide", diagonal_share=0.0, **BF16),
    "lists of documents": whole(
        8, q_heads=4, block_share=0.4, diagonal_share=0.2, columns=200, starts="anywhere", batch=2, **BF16
    ),
    "striped documents": Case(
        range(1, 16, 2), range(0, 16, 2), 16, q_heads=4, columns=256, starts="anywhere", **BF16
    ),
    "zigzag window": Case(
        (2, 3, 8, 9), (0, 1, 10, 11), 12, q_heads=2, starts="wide", diagonal_share=1.0, **BF16
    ),
    "mostly out of reach": Case(
        range(4, 8), range(4), 8, q_heads=2, columns=0, starts="narrow", diagonal_share=1.0, **BF16
    ),
    "documents in blocks of 64": whole(
        9, size=64, q_heads=2, dtype=torch.bfloat16, columns=100, starts="anywhere"
    ),
    "head_dim 64, documents": replace(
        whole(9, q_heads=4, kv_heads=2, columns=300, starts="anywhere", **BF16), dim=64
    ),
    "head_dim 64": replace(whole(9, q_heads=4, kv_heads=2, columns=300, **BF16), dim=64),
    "head_dim 96": replace(whole(6, q_heads=4, kv_heads=2, columns=200, **BF16), dim=96),
    "head_dim 256": replace(whole(5, q_heads=4, kv_heads=2, columns=200, **BF16), dim=256),
}
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, or a number far out of range, so that an entry nobody wrote is seen."""
    plain = torch.empty

    def poison(*args: object, **options: object) -> torch.Tensor:
        x: torch.Tensor = plain(*args, **options)  # type: ignore[call-overload]
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(torch.int32).max // 2)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture(params=["portable", "hopper"])
def backend(request: pytest.FixtureRequest) -> TritonBackend:
    """The portable kernels, and those for Hopper where there is one."""
    if request.param == "portable":
        return TritonBackend()
    reason = unsupported(torch.device("cuda"), torch.bfloat16, 128)
    if reason is not None:
        pytest.skip(reason)
    return HopperBackend()


@pytest.mark.parametrize("name", CASES)
def test_bf16(name: str, backend: TritonBackend) -> None:
    case = CASES[name]
    if case.dim not in (64, 128) and isinstance(backend, HopperBackend):
        pytest.skip("select_backend does not choose it for this head_dim")
    p = build(case, "cuda")
    assert_equal(solve(backend, p), reference(p), TOLERANCE[torch.bfloat16])
    assert_passes(backend, p, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize(
    "name", ["every tile", "group of 4", "striped, later rank", "all masked", "documents anywhere"]
)
def test_hopper_programs_that_stay(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes block after block of queries, as in long sequences: here one or two programs take them all."""
    reason = unsupported(torch.device("cuda"), torch.bfloat16, 128)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(hopper_backend, "_programs", lambda items, device: programs)
    p = build(CASES[name], "cuda")
    assert_equal(solve(HopperBackend(), p), reference(p), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_other_dtypes(dtype: torch.dtype, dim: int) -> None:
    p = build(replace(CASES["group of 4"], dtype=dtype, dim=dim), "cuda")
    backend = select_backend("triton", torch.device("cuda"), dtype, dim)
    assert_equal(solve(backend, p), reference(p), TOLERANCE[dtype])


def test_same_bits_twice(backend: TritonBackend) -> None:
    p = build(whole(64, q_heads=8, kv_heads=2, columns=1024, diagonal_share=0.2, **BF16), "cuda")
    (lse, first), (lse_again, second) = (solve(backend, p) for _ in range(2))
    assert torch.equal(lse, lse_again)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_offsets_past_2_to_the_31(backend: TritonBackend) -> None:
    """512K tokens of 32 heads: the last blocks against the reference on a slice of the same tensors."""
    n, size, heads, kv_heads, dim = 4096, 128, 32, 8, 128
    if torch.cuda.mem_get_info()[0] < 45 * 2**30:
        pytest.skip("needs 45 GiB of free GPU memory")
    made = torch.Generator("cuda").manual_seed(0)

    def tensor(count: int, length: int = n * size) -> torch.Tensor:
        return torch.randn(1, length, count, dim, generator=made, device="cuda", dtype=torch.bfloat16)

    q, k, v, dout = tensor(heads), tensor(kv_heads), tensor(kv_heads), tensor(heads)
    ck, cv = tensor(heads, 64), tensor(heads, 64)
    diagonals = torch.zeros(1, heads, n, dtype=torch.bool, device="cuda")
    diagonals[..., :2] = True
    columns = torch.arange(64, device="cuda", dtype=torch.int32).expand(1, heads, 64).contiguous()
    index = SparseIndex(n * size, size, diagonals, columns)
    place, scale = index.placement(), dim**-0.5
    out, lse = backend.tiles_forward(q, k, v, index, place, scale, None, None, columns=(ck, cv))
    delta = backend.row_delta(out, dout)
    dq, dkv = tiles_gradients(
        backend, dout, q, k, v, lse, delta, index, place, scale, None, columns=(ck, cv), final=True
    )

    rows = slice(-2 * size, None)
    q_blocks = torch.tensor([n - 2, n - 1], device="cuda")
    k_blocks = torch.tensor([n - 3, n - 2, n - 1], device="cuda")
    last, truth = Placement(q_blocks, k_blocks, n), ReferenceBackend()
    qs, dos = q[:, rows].double(), dout[:, rows].double()
    ks, vs = k[:, -3 * size :].double(), v[:, -3 * size :].double()
    compact = (ck.double(), cv.double())
    true_out, true_lse = truth.tiles_forward(qs, ks, vs, index, last, scale, None, None, columns=compact)
    true_delta = truth.row_delta(true_out, dos)
    true_dq, true_dkv = tiles_gradients(
        truth, dos, qs, ks, vs, true_lse, true_delta, index, last, scale, None, columns=compact
    )
    assert relative_error(out[:, rows], true_out) <= 4e-3
    assert (lse[..., rows] - true_lse).abs().max().item() <= 1e-5
    for got, true in zip((dq, *dkv), (true_dq, *true_dkv), strict=True):
        assert relative_error(got[:, rows], true[:, rows]) <= 4e-3  # the third last block has queries outside


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.filterwarnings(SYNC_CHECKS)
def test_nothing_waits_for_the_device(backend: TritonBackend) -> None:
    for name in ("group of 4", "block mask", "zigzag, others"):
        p = build(CASES[name], "cuda")
        solve(backend, p)  # compiled now, and constants of the placement are on the device
        torch.cuda.set_sync_debug_mode("error")
        solve(backend, p)
        torch.cuda.set_sync_debug_mode("default")


def test_auto_chooses_triton(caplog: pytest.LogCaptureFixture) -> None:
    choice._chosen.cache_clear()
    with caplog.at_level("INFO"):
        backend = select_backend("auto", torch.device("cuda"), torch.bfloat16, 128)
    assert backend.name.startswith("triton, dense ")
    assert "auto chose 'triton'" in caplog.text
