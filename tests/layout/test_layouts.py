"""Layouts are permutations with exact inverses, in whole blocks; wrong lengths name the nearest right one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtraining.errors import UserError
from mtraining.layout import LAYOUTS, Striped, build_layout


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 9), st.integers(1, 7), st.integers(1, 5))
def test_shard_and_unshard_are_inverse(name: str, world: int, unit: int, times: int) -> None:
    layout = build_layout(name, unit)
    seq_len = layout.multiple(world, unit) * times
    x = torch.randn(2, seq_len, 3)
    shards = [layout.shard(x, rank, world) for rank in range(world)]
    assert all(shard.shape == (2, seq_len // world, 3) for shard in shards)
    assert torch.equal(layout.unshard(shards), x)
    positions = layout.positions(seq_len, world)
    assert sorted(positions.flatten().tolist()) == list(range(seq_len))
    assert (positions.diff(dim=1) > 0).all()
    assert torch.equal(layout.shard(torch.arange(seq_len), 0, world, dim=0), positions[0])


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 8), st.sampled_from([1, 2, 8]), st.integers(1, 4))
def test_blocks_stay_whole(name: str, world: int, block: int, times: int) -> None:
    layout = build_layout(name, 8)
    positions = layout.positions(layout.multiple(world, block) * times, world)
    blocks = positions.unflatten(1, (-1, block))
    assert (blocks[..., 0] % block == 0).all()
    assert (blocks.diff(dim=-1) == 1).all()


def test_who_holds_what() -> None:
    assert build_layout("contiguous").positions(8, 4).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert build_layout("zigzag").positions(8, 2).tolist() == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert build_layout("striped", 2).positions(8, 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("name", "seq_len", "world", "block", "words"),
    [
        ("striped", 1000, 2, 64, "not a multiple of 256.*nearest length that works is 1024"),
        ("contiguous", 100, 3, 16, "multiple of 48.*nearest length that works is 96"),
        ("zigzag", 130, 2, 16, "multiple of 64.*128"),
        ("striped", 1000, 2, 1, r"multiple of 256 .128 tokens x 2 ranks.* for 2 ranks; the nearest"),
        ("zigzag", 16, 2, 16, "too few for the zigzag layout over 2 ranks"),
        ("striped", 0, 1, 1, "nearest length that works is 128"),
        ("striped", 1024, 2, 48, "layout.unit: a stripe of 128 tokens cuts the pattern's blocks of 48"),
    ],
)
def test_lengths_are_refused_with_the_nearest(
    name: str, seq_len: int, world: int, block: int, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        build_layout(name).check(seq_len, world, block)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_function_deals_a_length_that_does_not_divide(name: str) -> None:
    """Nor a rank, a number of ranks or a dimension that does not exist: some of these came out wrong in silence."""
    layout = build_layout(name, 4)
    for call in (
        lambda: layout.shard(torch.zeros(1, 1030), 0, 4),
        lambda: layout.positions(1030, 4),
        lambda: layout.blocks(1030, 4, 2),
    ):
        with pytest.raises(
            UserError, match=r"seq_len: 1030 is not a multiple of \d+ \(\d+ tokens x 4 ranks\)"
        ):
            call()
    x = torch.zeros(2, 32)
    for rank in (-1, 4):
        with pytest.raises(UserError, match=f"rank: {rank} does not exist among 4; use 0 to 3"):
            layout.shard(x, rank, 4)
    with pytest.raises(UserError, match="world: 0 ranks"):
        layout.positions(32, 0)
    with pytest.raises(UserError, match=r"dim: 2 does not exist in shape \(2, 32\)"):
        layout.shard(x, 0, 4, dim=2)
    parts = [layout.shard(x, rank, 4) for rank in range(4)]
    with pytest.raises(UserError, match=r"shards: lengths \[7, 8, 8, 8\] differ"):
        layout.unshard([parts[0][:, 1:], *parts[1:]])
    with pytest.raises(UserError, match="shards: there are none"):
        layout.unshard([])


def test_blocks_must_be_whole() -> None:
    with pytest.raises(UserError, match="seq_len: 12 is not a multiple of 8"):
        build_layout("contiguous").blocks(12, 2, 4)


def test_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'stripped' is not known .did you mean 'striped'"):
        build_layout("stripped")
    with pytest.raises(UserError, match=r"layout.unit: 0 tokens"):
        build_layout("striped", 0)
    with pytest.raises(UserError, match=r"layout.unit: 0 tokens"):
        Striped(unit=0)
