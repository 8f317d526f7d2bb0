"""The Triton estimation kernels against the eager reference: layouts, ties, budgets, absent columns."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.kernel import ReferenceBackend
from mtraining.kernel.triton.backend import TritonBackend
from mtraining.layout import build_layout

ours, reference = TritonBackend(), ReferenceBackend()


pytestmark = pytest.mark.usefixtures("poisoned")


def tokens(count: int, heads: int, dim: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> Tensor:
    """(batch, count, heads, dim) with strides of its own: a view of (batch, heads, count + 3, dim + 8)."""
    wide = torch.randn(batch, heads, count + 3, dim + 8).to(dtype)
    return wide[:, :, 3:, :dim].transpose(1, 2)


def slash_mass(
    probe: Tensor, k: Tensor, at: Tensor, positions: Tensor, lse: Tensor, seq_len: int, size: int
) -> Tensor:
    """What probe_mass means by slashes, entry by entry in fp64, scale 1 / sqrt(head_dim)."""
    keys = k.double().repeat_interleave(probe.shape[2] // k.shape[2], 2)
    prob = (
        torch.einsum("bphd,bkhd->bhpk", probe.double(), keys) * k.shape[3] ** -0.5 - lse.double()[..., None]
    )
    distance = at[:, None] - positions[None, :]
    prob = prob.exp().masked_fill(distance < 0, 0).flatten(0, 1).flatten(1)
    slashes = torch.zeros(prob.shape[0], seq_len // size + 2, dtype=torch.float64)
    share = (distance % size / size).flatten()
    for step, part in ((0, 1 - share), (1, share)):
        place = (distance.clamp(min=0) // size + step).flatten().expand_as(prob)
        slashes.scatter_add_(1, place, prob * part)
    return slashes[:, : seq_len // size]


def probe_positions(kind: str, count: int, seq_len: int) -> Tensor:
    spread = {"last": 0, "spread": count, "mixed": count // 2, "shuffled": count}[kind]
    before = seq_len - (count - spread)
    places = torch.cat([torch.randperm(before)[:spread].sort().values, torch.arange(before, seq_len)])
    return places[torch.randperm(count)] if kind == "shuffled" else places


def parts(layout: str, unit: int, seq_len: int, world: int) -> Sequence[Tensor]:
    if layout == "shuffled":
        return torch.randperm(seq_len).chunk(world)
    if layout == "uneven":
        return torch.arange(seq_len).split(seq_len // 2 + 13)
    return build_layout(layout, unit=unit).positions(seq_len, world).unbind()


@pytest.mark.parametrize(
    ("layout", "unit", "world", "seq_len", "q_heads", "kv_heads", "dim", "probes", "kind", "size"),
    [
        ("contiguous", 128, 1, 200, 4, 1, 64, 64, "last", 1),
        ("striped", 32, 2, 384, 3, 1, 32, 20, "last", 1),
        ("striped", 128, 2, 512, 2, 2, 128, 70, "last", 1),
        ("zigzag", 128, 2, 320, 4, 2, 96, 64, "spread", 1),
        ("striped", 128, 2, 512, 2, 1, 128, 130, "spread", 128),
        ("striped", 64, 2, 256, 3, 1, 64, 70, "mixed", 64),
        ("zigzag", 128, 2, 384, 1, 1, 32, 80, "spread", 96),
        ("contiguous", 128, 1, 96, 2, 2, 64, 20, "last", 48),
        ("contiguous", 128, 1, 640, 1, 1, 32, 20, "mixed", 320),
        ("contiguous", 128, 2, 512, 2, 1, 32, 20, "spread", 256),
        ("zigzag", 128, 2, 256, 1, 1, 32, 100, "shuffled", 64),
        ("striped", 32, 2, 256, 1, 1, 32, 70, "spread", 128),  # runs shorter than a tile
        ("uneven", 128, 2, 192, 1, 1, 32, 50, "spread", 64),
        ("shuffled", 128, 1, 64, 1, 1, 32, 20, "shuffled", 32),
    ],
)
def test_probe(
    layout: str,
    unit: int,
    world: int,
    seq_len: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    probes: int,
    kind: str,
    size: int,
) -> None:
    """Every rank's share; together they make up all the probe's mass."""
    probe, k, scale = tokens(probes, q_heads, dim), tokens(seq_len, kv_heads, dim), dim**-0.5
    at, everywhere = probe_positions(kind, probes, seq_len), torch.arange(seq_len)
    lse = reference.probe_lse(probe, k, at, everywhere, scale)
    total = torch.zeros(2 * q_heads, seq_len // size)
    for positions in parts(layout, unit, seq_len, world):
        keys = k.movedim(2, 1)[:, :, positions].movedim(1, 2)  # strides unlike those of k
        torch.testing.assert_close(
            ours.probe_lse(probe, keys, at, positions, scale),
            reference.probe_lse(probe, keys, at, positions, scale),
            rtol=1e-5,
            atol=1e-5,
        )
        result = ours.probe_mass(probe, keys, at, positions, scale, lse, seq_len, size)
        wanted = reference.probe_mass(probe, keys, at, positions, scale, lse, seq_len, size)
        for ours_one, reference_one in zip(result, wanted, strict=True):
            torch.testing.assert_close(ours_one, reference_one, rtol=1e-5, atol=1e-6)
        defined = slash_mass(probe, keys, at, positions, lse, seq_len, size)
        torch.testing.assert_close(wanted[1].double(), defined, rtol=1e-5, atol=1e-6)
        assert (result[1] >= 0).all()
        total += result[1]
    whole = slash_mass(probe, k, at, everywhere, lse, seq_len, size)
    torch.testing.assert_close(total.double(), whole, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", [1, 64])
def test_probe_in_fp16_repeats_bit_for_bit(size: int) -> None:
    probe, k = tokens(32, 2, 64, torch.float16), tokens(256, 1, 64, torch.float16)
    for kind in ("last", "spread"):
        at, positions = probe_positions(kind, 32, 256), torch.arange(256)
        lse = ours.probe_lse(probe, k, at, positions, 0.125)
        torch.testing.assert_close(
            lse, reference.probe_lse(probe, k, at, positions, 0.125), rtol=1e-5, atol=1e-5
        )
        first, second = (ours.probe_mass(probe, k, at, positions, 0.125, lse, 256, size) for _ in range(2))
        for once, again, wanted in zip(
            first, second, reference.probe_mass(probe, k, at, positions, 0.125, lse, 256, size), strict=True
        ):
            assert torch.equal(once, again)
            torch.testing.assert_close(once, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 32])
@pytest.mark.parametrize(
    "start", [120, 136, 256], ids=["few of a tile see", "a whole tile does not", "none does"]
)
def test_a_probe_query_before_every_local_key_sees_nothing(
    start: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tiles of queries; memory nobody wrote would pass for a score or a mass."""
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: plain(*shape, **options).fill_(1))
    probe, k = tokens(128, 1, 32), tokens(64, 1, 32)
    at, positions = torch.arange(128) * 2, torch.arange(start, start + 64)
    lse = ours.probe_lse(probe, k, at, positions, 1.0)
    assert torch.equal(lse.isneginf(), (at < start).expand_as(lse))
    for mass in ours.probe_mass(probe, k, at, positions, 1.0, lse, 320, size):
        assert mass.sum(1).tolist() == pytest.approx([(at >= start).sum().item()] * 2, rel=1e-5)


def test_blocks_that_no_tile_divides_are_refused() -> None:
    probe, k = tokens(8, 1, 32), tokens(24, 1, 32)
    with pytest.raises(
        UserError, match="block_size: kernel=triton needs a multiple of 16 tokens, not 24; use 32"
    ):
        ours.probe_mass(probe, k, torch.arange(8), torch.arange(24), 1.0, torch.zeros(2, 1, 8), 24, 24)


def forced_at(n: int, *places: int) -> Tensor:
    forced = torch.zeros(n, dtype=torch.bool)
    forced[list(places)] = True
    return forced


TOP_P = [None, 1e-7, 0.3, 0.9, 0.999, 1.0]


@pytest.mark.parametrize("top_p", TOP_P)
def test_heaviest_of_random_masses(top_p: float | None) -> None:
    """Five decades of masses in two chunks; the reference adds in fp64, so that only its rule counts."""
    mass = (torch.randn(3, 5000) * 4).exp()
    forced = forced_at(5000, 0, 1, 2, 4999)
    for keep in (7, 400, 6000):
        assert torch.equal(
            ours.heaviest(mass, forced, top_p, keep), reference.heaviest(mass.double(), forced, top_p, keep)
        )


@pytest.mark.parametrize("top_p", TOP_P)
def test_heaviest_among_equals_and_without_mass(top_p: float | None) -> None:
    """Dyadic masses: all sums are exact in fp32, so even a cut among equals must agree."""
    mass = torch.randint(0, 4, (4, 300)) / 8.0
    mass[1] = 0.0  # nothing to choose by
    mass[2] = 0.5  # one tie
    mass[3, :290] = 0.0  # less mass than budget
    for forced in (forced_at(300), forced_at(300, 3, 5, 299), forced_at(300, *range(20, 60))):
        for keep in (1, 40, 300):
            expected = reference.heaviest(mass, forced, top_p, keep)
            assert torch.equal(ours.heaviest(mass, forced, top_p, keep), expected)


def test_forced_entries_alone_may_exceed_the_budget() -> None:
    mass, forced = torch.rand(2, 100), forced_at(100, *range(10, 50))
    expected = torch.arange(10, 22).expand(2, -1)
    for top_p in (None, 0.5):
        assert torch.equal(ours.heaviest(mass, forced, top_p, 12), expected)


def test_all_of_the_mass_is_exactly_the_entries_that_have_any() -> None:
    """Short rows of very different masses: the sum needs more bits than fp64 would have if units were finer still."""
    mass = torch.exp2(torch.rand(32, 12) * 40) * (torch.rand(32, 12) < 0.6)
    expected = torch.where(mass > 0, torch.arange(12), 12).sort(1).values
    assert torch.equal(ours.heaviest(mass, forced_at(12), 1.0, 12), expected)


def test_heaviest_is_indifferent_to_scale_and_repeats() -> None:
    """Masses near both ends of fp32's range, subnormals included."""
    mass, forced = torch.rand(2, 700) + 0.5, forced_at(700, 1)
    plain = ours.heaviest(mass, forced, 0.5, 500)
    assert (plain < 700).sum() > 200
    for power in (-120, 110):
        assert torch.equal(ours.heaviest(mass * 2.0**power, forced, 0.5, 500), plain)
    tiny = torch.arange(200)[None] * 2.0**-149
    assert torch.equal(ours.heaviest(tiny, forced_at(200), None, 5), torch.arange(195, 200)[None])


def columns_of(batch: int, q_heads: int, seq_len: int, capacity: int) -> Tensor:
    """Random columns of varying number, ascending, padded with seq_len; head 0 of row 0 has none."""
    picked = torch.stack([torch.randperm(seq_len)[:capacity] for _ in range(batch * q_heads)])
    picked = torch.where(torch.rand(picked.shape) < 0.7, picked, seq_len).unflatten(0, (batch, q_heads))
    picked[0, 0] = seq_len
    return picked.sort(-1).values.int()


@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(4, 1, 64), (3, 1, 96), (2, 2, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_columns(q_heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    """Gathered and scattered on the rank that holds every other stripe."""
    seq_len, capacity = 192, 45
    positions = build_layout("striped", unit=16).positions(seq_len, 2)[1]
    slots = torch.full((seq_len,), -1).index_copy(0, positions, torch.arange(positions.numel()))
    columns = columns_of(2, q_heads, seq_len, capacity)
    k, v = tokens(positions.numel(), kv_heads, dim, dtype), tokens(positions.numel(), kv_heads, dim, dtype)
    expected = reference.gather_columns(k, v, columns, slots)
    assert torch.equal(ours.gather_columns(k, v, columns, slots), expected)

    grads = torch.randn(2, 2, capacity, q_heads, dim)
    before = torch.randn(2, 2, positions.numel(), kv_heads, dim)
    first, again, expected_grads = (before.clone() for _ in range(3))
    ours.scatter_columns(grads, columns, slots, first)
    ours.scatter_columns(grads, columns, slots, again)
    reference.scatter_columns(grads, columns, slots, expected_grads)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, expected_grads, rtol=1e-5, atol=1e-5)


def test_no_columns_at_all() -> None:
    k, none = tokens(32, 1, 32), torch.empty(2, 2, 0, dtype=torch.int32)
    assert ours.gather_columns(k, k, none, torch.arange(32)).shape == (2, 2, 0, 2, 32)
    dkv = torch.ones(2, 2, 32, 1, 32)
    ours.scatter_columns(torch.zeros(2, 2, 0, 2, 32), none, torch.arange(32), dkv)
    assert torch.equal(dkv, torch.ones_like(dkv))
