"""The eager reference against dense-masked attention in fp64: empty rows, empty heads, poisoned memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtraining.kernel import Placement, ReferenceBackend, SparseIndex, dense_index, merge, select_backend
from mtraining.kernel.index import pack_blocks
from mtraining.kernel.reference.attention import accumulation_dtype
from starts_cases import masked_attention, run_reference

SIZE = 8


def random_index(
    seq_len: int, heads: int, seed: int, columns: int = 12, diagonal_share: float = 0.4
) -> SparseIndex:
    """Head 0 selects nothing; the others random diagonals (not always the main one) and random columns."""
    generator = torch.Generator().manual_seed(seed)
    n = seq_len // SIZE
    diagonals = torch.rand(1, heads, n, generator=generator) < diagonal_share
    picked = torch.stack([torch.randperm(seq_len, generator=generator)[:columns] for _ in range(heads)])
    keep = torch.rand(heads, columns, generator=generator) < 0.7
    picked = torch.where(keep, picked, seq_len)
    diagonals[:, 0], picked[0] = False, seq_len
    return SparseIndex(seq_len, SIZE, diagonals, picked.sort().values[None].int())


def inputs(heads: int, kv_heads: int, seq_len: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    q, dout = (torch.randn(1, seq_len, heads, 16, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(1, seq_len, kv_heads, 16, dtype=dtype) for _ in range(2))
    return [q, k, v, dout]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every uninitialised tensor holds NaN, so that an entry nobody wrote is seen."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poison(*args: object, plain: object = plain, **kwargs: object) -> Tensor:
            x: Tensor = plain(*args, **kwargs)  # type: ignore[operator]
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poison)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 3)])
def test_equals_masked_attention(poisoned: None, seed: int, heads: int, kv_heads: int) -> None:
    torch.manual_seed(seed)
    q, k, v, dout = inputs(heads, kv_heads, 64)
    index = random_index(64, heads, seed)
    mask = index.to_mask()
    assert not mask.any(-1).all(), "the case must hold rows that see nothing"
    got = run_reference(q, k, v, dout, index)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = masked_attention(q, k, v, mask)
    out.backward(dout)
    for name, a, b in zip(
        ("out", "lse", "dq", "dk", "dv"), got, (out, lse, q.grad, k.grad, v.grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    unseen = ~mask.any(-1)
    assert (got[1][unseen] == -torch.inf).all() and (got[0].transpose(1, 2)[unseen] == 0).all()


def test_no_key_counts_twice() -> None:
    """Every column lies inside a selected block somewhere; counting it there again would raise lse."""
    q, k, v, dout = inputs(1, 1, 32)
    diagonals = torch.tensor([[[True, True, False, False]]])
    index = SparseIndex(32, SIZE, diagonals, torch.arange(32, dtype=torch.int32)[None, None])
    _, lse, *_ = run_reference(q, k, v, dout, index)
    _, dense_lse = masked_attention(q, k, v, torch.ones(32, 32, dtype=torch.bool).tril())
    torch.testing.assert_close(lse, dense_lse, rtol=1e-12, atol=1e-12)


def test_one_block_dense() -> None:
    q, k, v, dout = inputs(2, 1, SIZE)
    index = dense_index(1, 2, SIZE, SIZE, q.device)
    assert index.density().tolist() == [[1.0, 1.0]]
    out, *_ = run_reference(q, k, v, dout, index)
    torch.testing.assert_close(
        out, masked_attention(q, k, v, torch.ones(SIZE, SIZE, dtype=torch.bool).tril())[0]
    )


def test_low_precision_accumulates_in_fp32() -> None:
    q, k, v, dout = inputs(2, 1, 64, torch.bfloat16)
    index = random_index(64, 2, 0)
    low = run_reference(q, k, v, dout, index)
    high = run_reference(*(x.double() for x in (q, k, v, dout)), index)
    for a, b in zip(low, high, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert accumulation_dtype(torch.float64) == torch.float64


@pytest.mark.parametrize("empty", ["a", "b", "both"])
def test_merge_with_empty_sides(empty: str) -> None:
    out = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    lse = torch.randn(1, 2, 4, dtype=torch.float64)
    nothing, never = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    a = (nothing, never) if empty in ("a", "both") else (out, lse)
    b = (nothing, never) if empty in ("b", "both") else (out, lse)
    merged, merged_lse = merge(*a, *b)
    expected = (nothing, never) if empty == "both" else (out, lse)
    torch.testing.assert_close((merged, merged_lse), expected, rtol=1e-14, atol=0)


def test_merge_of_halves_is_the_whole() -> None:
    q, k, v, _ = inputs(2, 2, 32)
    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    left = causal & (torch.arange(32) < 9)
    merged = merge(*masked_attention(q, k, v, left), *masked_attention(q, k, v, causal & ~left))
    torch.testing.assert_close(merged, masked_attention(q, k, v, causal), rtol=1e-12, atol=1e-12)


def test_computed_area_is_what_the_kernel_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost must come from work done: count the reference's multiply-adds and compare. What fills up columns is left
    out, as it is nobody's cost."""
    from torch.utils.flop_counter import FlopCounterMode

    from mtraining.kernel.reference import attention

    monkeypatch.setattr(attention, "_WIDTHS", 1)
    q, k, v, _ = inputs(4, 2, 64)
    index = random_index(64, 4, 5)
    backend, place = ReferenceBackend(), index.placement()
    ck, cv = backend.gather_columns(k, v, index.columns, torch.arange(64))
    with FlopCounterMode(display=False) as counter:
        backend.tiles_forward(q, k, v, index, place, 1.0, None, None, columns=(ck, cv))
    assert counter.get_total_flops() == 4 * q.shape[-1] * int(index.computed_area().sum())


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("columns", [0, 5, 64])
def test_density_counts_what_is_selected_once(listed: bool, columns: int) -> None:
    """Against a mask of whole tiles and whole strips of columns; with every column it is dense, and not more."""
    torch.manual_seed(columns)
    diagonals = torch.rand(2, 3, 8) < 0.4
    blocks = torch.rand(2, 3, 8, 8) < 0.3
    chosen = torch.stack([torch.randperm(64)[:columns].sort().values for _ in range(6)]).view(2, 3, -1)
    padded = torch.nn.functional.pad(chosen, (0, 2), value=64).int()
    index = SparseIndex(64, 8, diagonals, padded, pack_blocks(blocks) if listed else None)
    block = torch.arange(64) // 8
    distance = block[:, None] - block
    tiles = diagonals[..., distance.clamp(min=0)]
    if listed:
        tiles = tiles | blocks[..., block, :][..., block]
    strips = torch.zeros(2, 3, 64, dtype=torch.bool).scatter(-1, chosen, True)[:, :, None]
    selected = (tiles | strips) & (distance >= 0)
    expected = selected.sum((-2, -1)) / (distance >= 0).sum()
    torch.testing.assert_close(index.density(), expected.double(), rtol=1e-6, atol=0)
    assert (index.cost() >= index.density()).all()
    if columns == 64:
        assert (index.density() == 1).all() and (index.cost() > 1).all()


def test_placement_tables() -> None:
    place = Placement(torch.tensor([1, 5]), torch.tensor([0, 4]), 8)
    assert place.q_slots.tolist() == [-1, 0, -1, -1, -1, 1, -1, -1]
    assert place.k_slots.tolist() == [0, -1, -1, -1, 1, -1, -1, -1]
    assert place.reachable_diagonals.nonzero().flatten().tolist() == [1, 5]


def test_unknown_kernel_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"kernel: 'cuda' is not known; choose one of auto, reference"):
        select_backend("cuda", torch.device("cpu"), torch.float32, 64)


@pytest.mark.parametrize("heads", [1, 4])
def test_gathered_columns_can_be_summed_over_ranks(heads: int) -> None:
    """NCCL refuses tensors that are not contiguous; gloo, which CI has, does not."""
    k, v = torch.randn(2, 1, 64, 1, 8).unbind(0)
    columns = torch.tensor([[[1, 5, 64]] * heads], dtype=torch.int32)
    packed = ReferenceBackend().gather_columns(k, v, columns, torch.arange(64))
    assert packed.shape == (2, 1, 3, heads, 8)
    assert packed.is_contiguous()
    assert torch.equal(packed[1, 0, 1], v[0, 5].expand(heads, 8)) and not packed[:, :, 2].any()
