"""Vertical-slash against a brute-force definition written from the paper, entry by entry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.kernel.reference.estimate import diagonal_mass
from mtraining.layout import build_layout
from mtraining.pattern import SequenceShard, VerticalSlash, build_pattern
from mtraining.pattern.diagonals import distances_to_diagonals, heaviest_diagonals
from mtraining.pattern.probe import probe_positions
from mtraining.pattern.vertical_slash import estimate_by_head
from mtraining.ring import Ring


def brute_force_mask(q: Tensor, k: Tensor, p: VerticalSlash) -> Tensor:
    """(heads, n, n) boolean mask of one sequence, by plain loops over docs/how/estimation.md."""
    n, heads, dim = q.shape
    group = heads // k.shape[1]
    masks = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        vertical, slash = [0.0] * n, [0.0] * n
        for row in probe_rows(n, p):
            weights = [math.exp(float(q[row, h] @ k[c, h // group]) / math.sqrt(dim)) for c in range(row + 1)]
            for c, w in enumerate(weights):
                vertical[c] += w / sum(weights)
                slash[row - c] += w / sum(weights)
        columns = keep(vertical, p.sinks, p.top_p, p.top_k_columns or p.max_columns)
        blocks = set()
        if p.slash_by == "token":
            distances = keep(slash, p.window, p.top_p, p.top_k_slashes or p.max_slashes)
            for d in distances:  # every block that a token at this distance can fall into
                blocks |= crossed(d, p.block_size)
        else:
            blocks = keep_diagonals(slash, p)
        for i in range(n):
            for j in range(i + 1):
                masks[h, i, j] = j in columns or (i // p.block_size - j // p.block_size) in blocks
    return masks


def probe_rows(n: int, p: VerticalSlash) -> list[int]:
    """The places of the probe; spread ones stand one in each equal part, golden-ratio multiples into it."""
    count = min(p.probe, n)
    spread = {"last": 0, "spread": count, "mixed": count // 2}[p.probe_at]
    before = n - (count - spread)
    rows = []
    for i in range(spread):
        start, end = i * before // spread, (i + 1) * before // spread
        rows.append(start + int((i + 1) * 0x9E3779B9 % 2**32 / 2**32 * (end - start)))
    return rows + list(range(before, n))


def crossed(distance: int, block_size: int) -> set[int]:
    """Block diagonals that a pair of tokens at this distance can lie on."""
    return {i // block_size - (i - distance) // block_size for i in range(distance, distance + block_size)}


def keep_diagonals(slash: list[float], p: VerticalSlash) -> set[int]:
    """Block diagonals by mass, while their tiles fit; each slash's mass is dealt over all places of a block."""
    n = len(slash) // p.block_size
    mass = [0.0] * (n + 1)
    for d, weight in enumerate(slash):
        for i in range(d, d + p.block_size):
            mass[min(n, i // p.block_size - (i - d) // p.block_size)] += weight / p.block_size
    forced = set().union(*(crossed(d, p.block_size) for d in range(p.window))) & set(range(n))
    order = sorted(range(n), key=lambda d: (d not in forced, -mass[d] if d not in forced else 0, d))
    chosen, total, tiles = set(forced), 0.0, 0
    for d in order:
        tiles += n - d
        full = tiles > p.slash_density * n * (n + 1) / 2
        if d not in forced and (full or (p.top_p is not None and total >= p.top_p * sum(mass[:n]))):
            break
        chosen.add(d)
        total += mass[d]
    return chosen


def keep(mass: list[float], forced: int, top_p: float | None, limit: int) -> set[int]:
    order = list(range(min(forced, len(mass)))) + sorted(
        range(forced, len(mass)), key=lambda i: (-mass[i], i)
    )
    chosen: set[int] = set()
    total = 0.0
    for i in order[:limit]:
        if top_p is not None and i >= forced and total >= top_p * sum(mass):
            break
        chosen.add(i)
        total += mass[i]
    return chosen


@settings(max_examples=60)
@given(
    st.integers(0, 2**20),
    st.sampled_from([4, 8]),
    st.sampled_from([None, 0.4, 0.9]),
    st.integers(1, 40),
    st.sampled_from(["last", "spread", "mixed"]),
    st.sampled_from([None, 0.05, 0.3, 0.6, 1.0]),
)
def test_equals_brute_force(
    seed: int, block_size: int, top_p: float | None, probe: int, probe_at: str, slash_density: float | None
) -> None:
    torch.manual_seed(seed)
    n = 32
    q, k = torch.randn(1, n, 4, 16, dtype=torch.float64) * 2, torch.randn(1, n, 2, 16, dtype=torch.float64)
    limits: dict[str, Any] = (
        {"top_k_columns": 7, "top_k_slashes": 6} if top_p is None else {"max_columns": 9, "max_slashes": 8}
    )
    if slash_density is not None:
        limits |= {"slash_by": "block", "slash_density": slash_density, "top_k_slashes": None}
    pattern = VerticalSlash(
        block_size=block_size, top_p=top_p, probe=probe, probe_at=probe_at, sinks=2, window=3, **limits
    )
    index = pattern.estimate(q, k, SequenceShard.whole(n), 1 / math.sqrt(16))
    assert torch.equal(index.to_mask()[0], brute_force_mask(q[0], k[0], pattern))


HEADS = (
    VerticalSlash(
        block_size=8,
        top_p=0.7,
        max_columns=20,
        max_slashes=15,
        probe=40,
        probe_at="spread",
        sinks=2,
        window=3,
    ),
    VerticalSlash(
        block_size=8,
        top_p=None,
        top_k_columns=9,
        slash_by="block",
        slash_density=0.4,
        probe=40,
        probe_at="spread",
        sinks=3,
        window=3,
    ),
)


def estimate_job(worker: Worker, layout: str, topology: tuple[int, ...], heads: int) -> Any:
    mesh = worker.ring_mesh(topology)
    torch.manual_seed(5)
    q, k = (
        torch.randn(2, 128, heads, 16, dtype=torch.float64) * 2,
        torch.randn(2, 128, 1, 16, dtype=torch.float64),
    )
    ring, dealt = Ring.over(mesh), build_layout(layout, 8)
    shard = SequenceShard(dealt.positions(128, ring.world), ring)
    by_head = tuple(HEADS[head % 2] for head in range(heads))
    mine = [dealt.shard(x, ring.rank, ring.world) for x in (q, k)]
    alone = [pattern.estimate(q, k, SequenceShard.whole(128), 0.25) for pattern in HEADS]
    return estimate_by_head(mine[0], mine[1], shard, 0.25, by_head), alone


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("topology", [(2,), (4,), (2, 2), (2, 4)], ids=str)
def test_distributed_estimate_equals_single_process(
    pool: ProcessPool, layout: str, topology: tuple[int, ...]
) -> None:
    """Five heads of two budgets over 2, 4 or 8 ranks: some ranks own padding rows only, and a probe of 40 has several
    owners. Each head must be as if its budget were everyone's."""
    for ours, alone in pool.run(
        estimate_job, world=math.prod(topology), layout=layout, topology=topology, heads=5
    ):
        for head in range(5):
            expected = alone[head % 2]
            used = expected.columns.shape[-1]
            assert torch.equal(ours.diagonals[:, head], expected.diagonals[:, head])
            assert torch.equal(ours.columns[:, head, :used], expected.columns[:, head])
            assert (ours.columns[:, head, used:] == 128).all()


@pytest.mark.parametrize("placement", ["last", "spread", "mixed"])
@pytest.mark.parametrize(("count", "n"), [(64, 8192), (256, 524_288), (5, 7), (9, 4), (1, 100)])
def test_probe_stands_where_it_should(placement: str, count: int, n: int) -> None:
    rows = probe_positions(count, placement, n, torch.device("cpu"))
    assert rows.tolist() == probe_rows(n, VerticalSlash(probe=count, probe_at=placement))
    assert rows.numel() == min(count, n) and (rows.diff() > 0).all()


def test_a_spread_probe_has_many_owners_in_a_striped_layout() -> None:
    """At equal steps of 8,192 tokens every query of 64 would stand on the same one of 32 ranks."""
    owners = probe_positions(64, "spread", 524_288, torch.device("cpu")) // 128 % 32
    assert owners.unique().numel() > 24


def test_block_slashes_beat_token_slashes_on_scattered_mass() -> None:
    """Mass scattered over a block diagonal is heavier than one lone distance, which token by token it never shows."""
    slashes = torch.zeros(1, 64)
    slashes[0, 24:32] = 1.0  # block diagonals 3 and 4
    slashes[0, 48] = 3.0  # block diagonal 6 alone
    mass = diagonal_mass(slashes, 8)
    assert mass.sum() == slashes.sum()
    assert mass[0, 6] == 3.0 and mass[0, 3] == pytest.approx(4.5) and mass[0, 4] == pytest.approx(3.5)
    bits = heaviest_diagonals(mass, torch.zeros(8, dtype=torch.bool), None, (8 - 3 + 8 - 4) / 36)
    assert bits[0].nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_share_of_diagonals_is_a_sum_of_integers(dtype: torch.dtype) -> None:
    """One row and many choose alike, and a share is reached when it is reached, not a rounding later."""
    mass = torch.rand(6, 300, dtype=dtype) ** 8 * torch.logspace(-20, 20, 6, dtype=dtype)[:, None]
    forced = torch.zeros(300, dtype=torch.bool)
    chosen = heaviest_diagonals(mass, forced, 0.9, 1.0)
    for row, bits in zip(mass, chosen, strict=True):
        assert torch.equal(heaviest_diagonals(row[None], forced, 0.9, 1.0)[0], bits)
        kept, least = row[bits].double().sum(), row[bits].double().min()
        assert kept >= 0.9 * row.double().sum() * (1 - 1e-6) > (kept - least) * (1 - 2e-6)
    tenths = torch.full((1, 10), 0.1, dtype=dtype)  # 0.1 added eight times is not 0.8
    assert heaviest_diagonals(tenths, torch.zeros(10, dtype=torch.bool), 0.8, 1.0).sum() == 8
    assert heaviest_diagonals(torch.zeros(1, 4), torch.zeros(4, dtype=torch.bool), 0.8, 1.0).sum() == 0


@given(st.integers(1, 9), st.lists(st.integers(0, 71), max_size=8))
def test_distances_cross_two_diagonals(block_size: int, distances: list[int]) -> None:
    n = 8 * block_size
    padded = torch.tensor([[d if d < n else n for d in distances]], dtype=torch.int64).view(1, -1)
    bits = distances_to_diagonals(padded, n, block_size)[0]
    expected = {i // block_size - (i - d) // block_size for d in distances for i in range(d, n) if d < n}
    assert set(bits.nonzero().flatten().tolist()) == expected


def test_index_is_linear_in_length() -> None:
    pattern = VerticalSlash(max_columns=64, max_slashes=128)
    sizes = []
    for n in (2048, 4096):
        q, k = torch.randn(1, n, 2, 16), torch.randn(1, n, 1, 16)
        sizes.append(pattern.estimate(q, k, SequenceShard.whole(n), 0.25).nbytes())
    assert (
        sizes[1] - sizes[0] == 2 * 2048 // 128
    )  # one bit-flag a block and head; columns have a fixed budget


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_p": 1.5}, "pattern.top_p: 1.5"),
        ({"top_p": None}, "pattern.top_k_columns: None"),
        ({"top_k_slashes": 5}, "needs pattern.top_p set to null"),
        ({"sinks": 40, "max_columns": 30}, "pattern.sinks: 40 .* column budget of 30"),
        ({"window": 0}, "pattern.window: 0"),
        ({"probe": 0}, "pattern.probe: 0"),
        ({"probe_at": "first"}, "pattern.probe_at: 'first' .* last, spread, mixed"),
        ({"slash_by": "tile"}, "pattern.slash_by: 'tile' .* token, block"),
        ({"slash_density": 0}, "pattern.slash_density: 0"),
        (
            {"top_p": None, "top_k_columns": 40, "top_k_slashes": 400, "slash_by": "block"},
            "pattern.top_k_slashes: 400 .* pattern.slash_density",
        ),
        ({"block_size": 0}, "pattern.block_size: 0"),
        ({"max_colums": 3}, "no such option .did you mean 'max_columns'"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_pattern("vertical_slash", **options)


def test_unknown_pattern_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'vertical_slash'"):
        build_pattern("vertical-slash")
