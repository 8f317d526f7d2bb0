"""What holds for every pattern: ranks agree with one process, full budgets are dense, every token sees itself."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.pattern import PATTERNS, SequenceShard, build_pattern
from mtraining.ring import Ring
from pattern_cases import FULL, SIZE, SPARSE, build_case

# these have files of their own
ELSEWHERE = {"vertical_slash", "dense", "toeplitz_random", "per_head"}


def inputs(seq_len: int, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(5)
    q = torch.randn(2, seq_len, heads, 16, dtype=torch.float64) * 2
    k = torch.randn(2, seq_len, kv_heads, 16, dtype=torch.float64)
    k[:, ::11] *= 2
    return q, k


def estimate_jobs(
    worker: Worker, topology: tuple[int, ...], layout: str
) -> dict[str, tuple[SparseIndex, SparseIndex]]:
    """(distributed and made whole, single-process) for every case."""
    mesh = worker.ring_mesh(topology)
    ring, dealt = Ring.over(mesh), build_layout(layout, SIZE)
    shard = SequenceShard(dealt.positions(128, ring.world), ring)
    q, k = inputs(128)
    mine = [dealt.shard(x, ring.rank, ring.world) for x in (q, k)]
    found = {}
    for name, case in SPARSE.items():
        pattern = build_case(case)
        index = pattern.estimate(mine[0], mine[1], shard, 0.25)
        if index.blocks is not None:
            assert index.block_rows is not None and index.blocks.shape[2] * ring.world == 128 // SIZE
        found[name] = index.whole(ring), pattern.estimate(q, k, SequenceShard.whole(128), 0.25)
    return found


def test_no_pattern_is_left_out() -> None:
    for table in (SPARSE, FULL):
        assert {name for name, _ in table.values()} == set(PATTERNS) - ELSEWHERE


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("topology", [(2,), (4,), (2, 2), (4, 2)], ids=str)
def test_ranks_find_what_one_process_finds(pool: ProcessPool, layout: str, topology: tuple[int, ...]) -> None:
    for found in pool.run(estimate_jobs, world=math.prod(topology), topology=topology, layout=layout):
        for name, (ours, alone) in found.items():
            assert torch.equal(ours.to_mask(), alone.to_mask()), name


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_and_every_token_sees_itself(name: str) -> None:
    q, k = inputs(128)
    index = build_case(SPARSE[name]).estimate(q, k, SequenceShard.whole(128), 0.25)
    mask = index.to_mask()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    assert not torch.equal(mask, torch.ones(128, 128, dtype=torch.bool).tril().expand_as(mask))


@pytest.mark.parametrize("name", FULL)
def test_full_budget_selects_everything(name: str) -> None:
    q, k = inputs(64)
    mask = build_case(FULL[name]).estimate(q * 30, k, SequenceShard.whole(64), 0.25).to_mask()
    assert torch.equal(mask, torch.ones(64, 64, dtype=torch.bool).tril().expand_as(mask))


@pytest.mark.parametrize("name", SPARSE)
def test_gradients_do_not_reach_the_selection(name: str) -> None:
    q, k = (x.requires_grad_() for x in inputs(64))
    index = build_case(SPARSE[name]).estimate(q, k, SequenceShard.whole(64), 0.25)
    assert not any(x.requires_grad for x in (index.diagonals, index.columns, index.blocks) if x is not None)


@pytest.mark.parametrize("name", PATTERNS)
def test_options_of_another_kind_are_refused_by_name(name: str) -> None:
    """What a YAML file may hold by mistake: a list, text or a truth value for a number, a fraction of a token."""
    for option in fields(PATTERNS[name]):
        with pytest.raises(UserError, match=rf"pattern\.{option.name}: .* does not fit {name}|is no pattern"):
            build_pattern(name, **{option.name: [1]})
    for wrong in (True, 128.5, "much", None):
        with pytest.raises(
            UserError, match=rf"pattern.block_size: {wrong!r} does not fit {name}; give a whole"
        ):
            build_pattern(name, block_size=wrong)


def test_text_that_reads_as_a_number_is_one() -> None:
    """YAML takes 5e-2 for text, as it lacks a decimal point."""
    assert build_pattern("vertical_slash", slash_density="5e-2") == build_pattern(
        "vertical_slash", slash_density=0.05
    )
    assert build_pattern("moba", chunk="512").chunk == 512  # type: ignore[attr-defined]
    assert build_pattern("vertical_slash", top_p=None, top_k_columns=64, top_k_slashes=128).top_p is None  # type: ignore[attr-defined]
