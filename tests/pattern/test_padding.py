"""Padding at the end of a sequence changes nothing of what is chosen among its real tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.pattern import Pattern, PerHead, SequenceShard, build_pattern
from mtraining.ring import Observer, Ring, sparse_ring_attention
from pattern_cases import SIZE, SPARSE, build_case

HEADS, KV_HEADS, DIM = 4, 2, 16
SCALE = DIM**-0.5
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **SPARSE,
    "flexprefill, vertical-slash": ("flexprefill", {"gamma": 0.5, "tau": 0.0, "max_columns": 20}),
    "flexprefill, query-aware": ("flexprefill", {"gamma": 0.5, "tau": 9.0, "max_columns": 20}),
    "dense": ("dense", {}),
    "top_p": ("vertical_slash", {"top_p": 0.5, "probe": 16, "sinks": 3, "window": 2}),
    "top_k": (
        "vertical_slash",
        {"top_p": None, "top_k_columns": 8, "top_k_slashes": 6, "probe": 16, "sinks": 3, "window": 2},
    ),
    "by block": (
        "vertical_slash",
        {"top_p": None, "top_k_columns": 8, "slash_by": "block", "slash_density": 0.4, "probe": 12,
         "probe_at": "mixed", "sinks": 3, "window": 2},
    ),
    "spread": ("vertical_slash", {"top_p": 0.5, "probe": 16, "probe_at": "spread", "sinks": 3, "window": 2}),
    "toeplitz_random": ("toeplitz_random", {"density": 0.5, "window": 1, "columns": 6}),
}  # fmt: skip


def pattern_of(name: str) -> Pattern:
    if name != "per_head":
        return build_case(CASES[name])
    return PerHead(SIZE, tuple(build_case(CASES[one]) for one in ("top_k", "moba", "by block", "a_shape")))


def tensors(length: int, padded: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of ``length`` tokens, the same for every ``padded`` and ``seed``, which only draw the padding."""
    real, other = torch.Generator().manual_seed(7), torch.Generator().manual_seed(100 + seed)
    made = []
    for heads in (HEADS, KV_HEADS, KV_HEADS):
        x = torch.randn(1, length, heads, DIM, generator=real, dtype=torch.float64)
        filler = torch.randn(1, padded - length, heads, DIM, generator=other, dtype=torch.float64)
        made.append(torch.cat([3 * x, 30 * filler], 1))
    return made[0], made[1], made[2]


def chosen(pattern: Pattern, length: int, padded: int, seed: int = 0) -> SparseIndex:
    q, k, _ = tensors(length, padded, seed)
    shard = SequenceShard.whole(padded, padding=padded - length)
    return pattern.estimate(q, k, shard, SCALE)


def real_mask(index: SparseIndex, length: int) -> Tensor:
    return index.to_mask()[..., :length, :length]


@pytest.mark.parametrize("length", [61, 64, 97, 104])
@pytest.mark.parametrize("name", [*CASES, "per_head"])
def test_what_is_chosen_does_not_depend_on_padding(name: str, length: int) -> None:
    pattern, covered = pattern_of(name), -(-length // SIZE) * SIZE
    reference = real_mask(chosen(pattern, length, covered), length)
    assert name == "dense" or not reference.all(dim=-1)[..., -1].all(), "a full index tests nothing"
    for padded, seed in ((covered, 1), (covered + SIZE, 2), (covered + 9 * SIZE, 3)):
        index = chosen(pattern, length, padded, seed)
        assert index.seq_len == padded
        assert torch.equal(real_mask(index, length), reference)
        assert torch.equal(index.upto(covered).to_mask()[..., :length, :length], reference)


@pytest.mark.parametrize("name", [*CASES, "per_head"])
def test_whole_blocks_choose_as_without_padding(name: str) -> None:
    q, k, _ = tensors(96, 96)
    plain = pattern_of(name).estimate(q, k, SequenceShard.whole(96), SCALE).to_mask()
    assert torch.equal(real_mask(chosen(pattern_of(name), 96, 128), 96), plain)


@pytest.mark.parametrize("name", ["top_k", "by block", "moba", "toeplitz_random"])
def test_an_index_that_ignores_the_padding_is_not_what_plain_estimation_gives(name: str) -> None:
    """Told of no padding, these patterns choose otherwise: the tests above can fail."""
    q, k, _ = tensors(61, 128)
    misled = pattern_of(name).estimate(q, k, SequenceShard.whole(128), SCALE)
    assert not torch.equal(real_mask(misled, 61), real_mask(chosen(pattern_of(name), 61, 64), 61))


def ring_outputs(worker: Worker, name: str, layout: str, length: int, padded: int) -> Tensor:
    """Job: attention of the real tokens, in global order; the density is asserted to be theirs."""
    mesh, dealt = worker.mesh(), build_layout(layout, SIZE)
    q, k, v = (dealt.shard(x, worker.rank, worker.world) for x in tensors(length, padded, seed=worker.world))
    with Observer(recall_rows=32) as observer:
        out = sparse_ring_attention(
            q, k, v, pattern=pattern_of(name), layout=dealt, mesh=mesh, padding=padded - length
        )
    covered = -(-length // SIZE) * SIZE
    alone = chosen(pattern_of(name), length, covered)
    assert observer.stats[0].density == pytest.approx(alone.density().mean().item(), rel=1e-6)
    assert 0 < (observer.stats[0].recall or 0) <= 1 + 1e-9
    return dealt.unshard(list(Ring.over(mesh).all_gather(out.contiguous())))[:, :length]


@pytest.mark.parametrize(
    ("name", "layout"),
    [("top_k", "striped"), ("flexprefill", "zigzag"), ("xattention", "contiguous"), ("moba", "striped"),
     ("per_head", "striped"), ("union", "zigzag")],
)  # fmt: skip
def test_a_padded_ring_gives_what_one_process_gives(pool: ProcessPool, name: str, layout: str) -> None:
    length, covered = 99, 104
    expected = sparse_ring_attention(
        *tensors(length, covered), pattern=pattern_of(name), layout=build_layout("striped", SIZE),
        mesh=None, padding=covered - length,
    )[:, :length]  # fmt: skip
    for out in pool.run(ring_outputs, world=2, name=name, layout=layout, length=length, padded=128):
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_padding_that_leaves_nothing_is_refused() -> None:
    from mtraining.errors import UserError

    q, k, v = tensors(8, 8)
    with pytest.raises(UserError, match="padding: 8 of 8 tokens leaves no sequence"):
        sparse_ring_attention(
            q, k, v, pattern=build_pattern("dense", block_size=8), layout=build_layout("striped", 8),
            mesh=None, padding=8,
        )  # fmt: skip
