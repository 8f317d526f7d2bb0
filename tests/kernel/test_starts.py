"""Starts in the index and in the reference: every selected entry from a query's start on, and no other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtraining import UserError
from mtraining.kernel import ReferenceBackend, SparseIndex, pack_blocks
from mtraining.kernel.starts import check_starts, first_local_keys, window_starts
from starts_cases import STARTS, allowed, masked_attention, of_documents, of_window, run_reference

SIZE, TOKENS = 8, 128


def random_index(seed: int, batch: int = 2, heads: int = 4, listed: bool = False) -> SparseIndex:
    """Head 0 is dense; the rest random diagonals, columns and, where asked for, block lists."""
    generator = torch.Generator().manual_seed(seed)
    n = TOKENS // SIZE
    diagonals = torch.rand(batch, heads, n, generator=generator) < 0.4
    diagonals[:, 0] = True
    columns = torch.rand(batch, heads, TOKENS, generator=generator).topk(20, -1).indices
    columns = torch.where(torch.rand(columns.shape, generator=generator) < 0.8, columns, TOKENS)
    index = SparseIndex(TOKENS, SIZE, diagonals, columns.sort().values.int())
    if listed:
        index = replace(index, blocks=pack_blocks(torch.rand(batch, heads, n, n, generator=generator) < 0.3))
    return index


def plain_mask(index: SparseIndex, starts: Tensor) -> Tensor:
    """The mask, entry by entry."""
    batch, heads, _ = index.diagonals.shape
    mask = torch.zeros(batch, heads, TOKENS, TOKENS, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            columns = set(index.columns[b, h].tolist())
            for q in range(TOKENS):
                for k in range(int(starts[b, q]), q + 1):
                    selected = k in columns or bool(index.diagonals[b, h, q // SIZE - k // SIZE])
                    if index.blocks is not None:
                        byte = int(index.blocks[b, h, q // SIZE, k // SIZE // 8])
                        selected = selected or bool(byte >> (k // SIZE % 8) & 1)
                    mask[b, h, q, k] = selected
    return mask


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", STARTS)
def test_the_reference_equals_masked_attention(name: str, listed: bool) -> None:
    starts = STARTS[name]
    index = replace(random_index(3, listed=listed), starts=starts)
    mask = index.to_mask()
    assert torch.equal(mask, plain_mask(index, starts))
    q, dout = torch.randn(2, 2, TOKENS, 4, 16, dtype=torch.float64).unbind(0)
    k, v = torch.randn(2, 2, TOKENS, 2, 16, dtype=torch.float64).unbind(0)
    got = run_reference(q, k, v, dout, index)
    for x in (q, k, v):
        x.requires_grad_()
    out, lse = masked_attention(q, k, v, mask)
    want = [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]
    for what, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("name", STARTS)
def test_tiles_are_those_with_an_entry_left(name: str) -> None:
    """A kept tile has a kept entry, and an entry left is in a kept tile: at full density both at once."""
    n = TOKENS // SIZE
    every = torch.arange(n)
    index = SparseIndex(
        TOKENS, SIZE, torch.ones(2, 1, n, dtype=torch.bool), torch.empty(2, 1, 0, dtype=torch.int32),
        starts=STARTS[name],
    )  # fmt: skip
    tiles = index.tile_mask(every, every)
    left = allowed(STARTS[name]).unflatten(3, (n, SIZE)).unflatten(2, (n, SIZE))
    assert torch.equal(tiles, left.any(5).any(3))
    assert torch.equal(index.density(), torch.ones(2, 1, dtype=torch.float64))
    assert torch.equal(index.computed_area(), tiles.sum((2, 3), dtype=torch.float64) * SIZE**2)
    # The queries that see a key block, from the other side.
    ends = n - tiles[:, 0].flip(1).int().argmax(1)
    assert torch.equal(index.end_blocks.long(), ends)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", STARTS)
def test_computed_area_is_what_the_reference_multiplies(
    name: str, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from mtraining.kernel.reference import attention

    monkeypatch.setattr(attention, "_WIDTHS", 1)  # what fills up columns is nobody's cost
    index = replace(random_index(5, listed=listed), starts=STARTS[name])
    q = torch.randn(2, TOKENS, 4, 8)
    k = torch.randn(2, TOKENS, 2, 8)
    backend = ReferenceBackend()
    ck, cv = backend.gather_columns(k, k, index.columns, torch.arange(TOKENS))
    with FlopCounterMode(display=False) as counter:
        backend.tiles_forward(q, k, k, index, index.placement(), 1.0, None, None, columns=(ck, cv))
    assert counter.get_total_flops() == 4 * 8 * int(index.computed_area().sum())


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", STARTS)
def test_density_counts_what_is_selected_once(name: str, listed: bool) -> None:
    """Against whole tiles, and strips of columns over the blocks of queries that may attend to them."""
    index = replace(random_index(4, listed=listed), starts=STARTS[name])
    every = torch.arange(TOKENS // SIZE)
    tiles = index.tile_mask(every, every).repeat_interleave(SIZE, -1)
    column = torch.zeros(2, 4, TOKENS + 1, dtype=torch.bool).scatter(-1, index.columns.long(), True)[
        ..., :TOKENS
    ]
    token = torch.arange(TOKENS)
    reads = (every[:, None] >= token // SIZE) & (token >= STARTS[name][:, ::SIZE, None])
    selected = (tiles | column[:, :, None] & reads[:, None]).sum((2, 3), dtype=torch.float64) * SIZE
    whole = allowed(STARTS[name]).unflatten(3, (-1, SIZE)).unflatten(2, (-1, SIZE)).any(5).any(3)
    left = whole.sum((2, 3), dtype=torch.float64) * SIZE**2
    torch.testing.assert_close(index.density(), selected / left, rtol=1e-12, atol=0)
    torch.testing.assert_close(index.cost(), index.computed_area() / left, rtol=1e-12, atol=0)
    assert (index.cost() >= index.density()).all()


def test_a_part_and_an_extension_keep_the_starts() -> None:
    index = replace(random_index(1), starts=STARTS["documents anywhere"])
    part = index.upto(64)
    assert torch.equal(part.to_mask(), index.to_mask()[..., :64, :64])
    longer = part.extended(96)
    assert torch.equal(longer.to_mask()[..., :64, :64], part.to_mask())
    assert longer.starts is not None
    check_starts(longer.starts, 2, 96, torch.device("cpu"))


def test_starts_of_a_window() -> None:
    assert torch.equal(window_starts(40, 7), of_window(40, 7))


def test_new_starts_in_the_same_memory_have_tables_of_their_own() -> None:
    """As a static buffer brings them, batch after batch."""
    place = random_index(1).placement()
    buffer = STARTS["documents anywhere"].clone()
    first = first_local_keys(buffer, place, SIZE)
    assert first_local_keys(buffer, place, SIZE) is first
    assert torch.equal(first, STARTS["documents anywhere"])
    buffer.copy_(STARTS["chunks"])
    assert torch.equal(first_local_keys(buffer, place, SIZE), STARTS["chunks"])


@pytest.mark.parametrize(
    "starts",
    [
        of_documents([4, 4]).long(),
        of_documents([4]),
        of_documents([4, 4], [8]),
        torch.tensor([[0, 1, 2, 1, 0, 0, 0, 0]], dtype=torch.int32),
        torch.tensor([[0, 2, 2, 2, 2, 2, 2, 2]], dtype=torch.int32),
        torch.tensor([[-1, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32),
    ],
    ids=["dtype", "length", "batch", "decreasing", "after the query", "negative"],
)
def test_what_are_no_starts_is_refused(starts: Tensor) -> None:
    with pytest.raises(UserError, match=r"^starts: .*give "):
        check_starts(starts, 1, 8, torch.device("cpu"))
