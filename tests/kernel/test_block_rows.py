"""Block lists: packed bits, one rank's rows, and the whole index put together again."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtraining.kernel import Placement, ReferenceBackend, SparseIndex, pack_blocks
from mtraining.layout import build_layout
from mtraining.ring import tile_work

SIZE, BLOCKS, WORLD = 4, 12, 3


def listed(blocks: Tensor, rows: Tensor | None = None) -> SparseIndex:
    """An index of block lists, one diagonal and two columns; ``blocks`` bool (batch, heads, rows, BLOCKS)."""
    heads = blocks.shape[:2]
    diagonals = torch.zeros(*heads, BLOCKS, dtype=torch.bool)
    diagonals[..., 3] = True
    columns = torch.tensor([2, 17]).int().expand(*heads, 2)
    return SparseIndex(BLOCKS * SIZE, SIZE, diagonals, columns, pack_blocks(blocks), rows)


@dataclass
class Ranks:
    """Plays the collective of ranks that take turns in one process."""

    shares: list[dict[str, Tensor]]
    asked: list[str] = field(default_factory=lambda: ["block_rows", "blocks"])

    def all_gather(self, x: Tensor) -> Tensor:
        name = self.asked.pop(0)
        gathered = torch.stack([share[name] for share in self.shares])
        assert gathered.shape[1:] == x.shape
        return gathered


def shards(blocks: Tensor, layout: str) -> list[SparseIndex]:
    rows = build_layout(layout, SIZE).positions(BLOCKS * SIZE, WORLD)[:, ::SIZE] // SIZE
    return [listed(blocks[:, :, mine], mine) for mine in rows]


@given(st.integers(1, 70), st.integers(0, 2**16))
def test_a_packed_bit_is_where_kernels_look_for_it(n: int, seed: int) -> None:
    mask = torch.rand(2, 3, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_blocks(mask)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, -(-n // 8))
    for j in range(n):
        assert torch.equal((packed[..., j // 8] >> (j % 8)) & 1 == 1, mask[..., j])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_ranks_hold_their_rows_and_make_the_index_whole(layout: str) -> None:
    blocks = torch.rand(2, 3, BLOCKS, BLOCKS) < 0.4
    whole, every = listed(blocks), torch.arange(BLOCKS)
    parts = shards(blocks, layout)
    shares = [{"blocks": part.blocks, "block_rows": part.block_rows} for part in parts]
    for part in parts:
        mine = part.block_rows
        assert mine is not None and part.blocks is not None
        assert part.blocks.numel() * WORLD == whole.blocks.numel()  # type: ignore[union-attr]
        assert torch.equal(part.tile_mask(mine, every), whole.tile_mask(mine, every))
        again = part.whole(Ranks(shares))  # type: ignore[arg-type]
        assert torch.equal(again.to_mask(), whole.to_mask())
        assert torch.equal(again.density(), whole.density())
    assert whole.whole(Ranks([])) is whole


def test_one_ranks_rows_answer_for_no_others() -> None:
    part = shards(torch.rand(1, 1, BLOCKS, BLOCKS) < 0.4, "striped")[1]
    for question in (part.density, part.to_mask, part.computed_area):
        with pytest.raises(ValueError, match="make it whole first"):
            question()
    with pytest.raises(ValueError, match="make it whole first"):
        tile_work(part, build_layout("striped", SIZE), WORLD)
    for others in (torch.arange(BLOCKS), torch.tensor([0, 3, 6, 9])):
        with pytest.raises(ValueError, match="own query blocks only"):
            part.tile_mask(others, torch.arange(BLOCKS))


def test_attention_over_one_ranks_rows_is_that_part_of_the_whole() -> None:
    blocks = torch.rand(1, 2, BLOCKS, BLOCKS) < 0.4
    backend, every = ReferenceBackend(), torch.arange(BLOCKS)
    q, k, v = (torch.randn(1, BLOCKS * SIZE, 2, 8, dtype=torch.float64) for _ in range(3))
    whole = listed(blocks)
    ck, cv = backend.gather_columns(k, v, whole.columns, torch.arange(BLOCKS * SIZE))

    def attend(index: SparseIndex, mine: Tensor) -> tuple[Tensor, Tensor]:
        rows = q.unflatten(1, (BLOCKS, SIZE))[:, mine].flatten(1, 2)
        place = Placement(mine, every, BLOCKS)
        return backend.tiles_forward(rows, k, v, index, place, 0.3, None, None, columns=(ck, cv))

    out, lse = attend(whole, every)
    for part in shards(blocks, "zigzag"):
        mine = part.block_rows
        assert mine is not None
        for index in (part, whole):
            got, got_lse = attend(index, mine)
            assert torch.equal(got, out.unflatten(1, (BLOCKS, SIZE))[:, mine].flatten(1, 2))
            assert torch.equal(got_lse, lse.unflatten(2, (BLOCKS, SIZE))[:, :, mine].flatten(2, 3))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_listed_work_is_counted_tile_by_tile(layout: str, world: int) -> None:
    index, dealt = listed(torch.rand(2, 3, BLOCKS, BLOCKS) < 0.3), build_layout(layout, SIZE)
    blocks = dealt.positions(BLOCKS * SIZE, world)[:, ::SIZE] // SIZE
    counted = [[index.tile_mask(mine, theirs).sum() for theirs in blocks] for mine in blocks]
    assert torch.equal(tile_work(index, dealt, world), torch.tensor(counted).double())


def test_bytes_are_what_is_held() -> None:
    index = shards(torch.zeros(1, 2, BLOCKS, BLOCKS, dtype=torch.bool), "striped")[0]
    assert index.nbytes() == 2 * (BLOCKS + 2 * 4 + 4 * 2)  # diagonals, columns, four rows of two bytes
