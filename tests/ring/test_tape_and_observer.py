"""Recompute replays the first pass's index; observers tell what attention really did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distributed import ProcessPool, Worker
from mtraining.layout import build_layout
from mtraining.pattern import Pattern, VerticalSlash, build_pattern
from mtraining.ring import IndexTape, Observer, sparse_ring_attention
from pattern_cases import Counting

OPTIONS = {"block_size": 8, "top_p": 0.5, "max_columns": 9, "max_slashes": 9, "sinks": 2, "window": 3}


def gradients(x: Tensor, tape: IndexTape | None, pattern: VerticalSlash) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()

    def layer(x: Tensor) -> Tensor:
        q, k, v = x, x[:, :, :2] * 1.5, x[:, :, 2:].sin()
        return sparse_ring_attention(q, k, v, pattern=pattern, layout="contiguous", mesh=None) + x

    if tape is None:
        out = layer(layer(x))
    else:

        def both(x: Tensor) -> Tensor:
            return layer(layer(x))

        out = checkpoint(both, x, use_reentrant=False, context_fn=lambda: (tape.record(), tape.replay()))
    out.square().sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("keep_outputs", [False, True])
def test_recompute_reuses_the_index(keep_outputs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 64, 4, 16, dtype=torch.float64)
    plain, recomputed = Counting(**OPTIONS), Counting(**OPTIONS)
    import mtraining.ring.attention as module

    forwards = []
    real = module.ring_forward
    monkeypatch.setattr(module, "ring_forward", lambda *a: forwards.append(1) or real(*a))
    expected = gradients(x, None, plain)
    forwards.clear()
    got = gradients(x, IndexTape(keep_outputs), recomputed)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert len(recomputed.calls) == len(plain.calls) == 2
    assert len(forwards) == (2 if keep_outputs else 4)


def test_replaying_more_calls_than_recorded_is_an_error() -> None:
    tape = IndexTape()
    with tape.record():
        pass
    with tape.replay(), pytest.raises(RuntimeError, match="not deterministic"):
        gradients(torch.randn(1, 64, 4, 16), None, VerticalSlash(**OPTIONS))


def observe_job(worker: Worker, top_p: float) -> tuple[float, float, float, list[list[float]]]:
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 128, 4, 16) * 2, torch.randn(1, 128, 2, 16), torch.randn(1, 128, 2, 16)
    layout = build_layout("striped", 8)
    q, k, v = (layout.shard(x, worker.rank, worker.world) for x in (q, k, v))
    pattern = VerticalSlash(**(OPTIONS | {"top_p": top_p, "max_columns": 24, "max_slashes": 12}))
    with Observer(recall_rows=16) as seen:
        sparse_ring_attention(q, k, v, pattern=pattern, layout=layout, mesh=worker.mesh())
    (stats,) = seen.stats
    mask = stats.index.to_mask()
    return (
        stats.density,
        stats.recall or 0.0,
        mask.float().sum().item() / (4 * 128 * 129 / 2),
        stats.tile_work.tolist(),
    )


def test_observer_reports_density_recall_and_work(pool: ProcessPool) -> None:
    some = pool.run(observe_job, world=2, top_p=0.3)
    assert 0.05 < some[0][1] < 0.999
    assert some[0] == some[1], "every rank must report the same"
    assert some[0][0] == pytest.approx(some[0][2], rel=0.2), "density counts tiles, the mask counts entries"


def test_recall_is_the_kept_share_of_the_true_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    q, k, v = (
        torch.randn(1, 64, 2, 16).double(),
        torch.randn(1, 64, 1, 16).double(),
        torch.randn(1, 64, 1, 16).double(),
    )
    rows = torch.tensor([5, 40, 63])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: rows)
    with Observer(recall_rows=3) as seen:
        _, index = sparse_ring_attention(
            q, k, v, pattern=VerticalSlash(**OPTIONS), layout="contiguous", mesh=None, return_index=True
        )
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2) / 4).masked_fill(
        ~torch.ones(64, 64, dtype=torch.bool).tril(), -torch.inf
    )
    kept = (scores.softmax(-1) * index.to_mask())[:, :, rows].sum(-1).mean().item()
    assert seen.stats[0].recall == pytest.approx(kept, rel=1e-12)


def test_observing_is_off_outside() -> None:
    with Observer() as seen:
        pass
    gradients(torch.randn(1, 64, 4, 16), None, VerticalSlash(**OPTIONS))
    assert seen.stats == []


def listed_job(worker: Worker, keep_outputs: bool) -> tuple[list[object], bool, int]:
    """What two ranks see of a pattern with block lists, and whether recompute changes any gradient."""
    torch.manual_seed(3)
    layout, mesh = build_layout("zigzag", 8), worker.mesh()
    pattern = build_pattern("moba", block_size=8, chunk=16, top_k=2)
    x = layout.shard(
        torch.randn(1, 128, 4, 16, dtype=torch.float64), worker.rank, worker.world
    ).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        q, k, v = x, x[:, :, :2] * 1.5, x[:, :, 2:].sin()
        return sparse_ring_attention(q, k, v, pattern=pattern, layout=layout, mesh=mesh)

    with Observer() as seen:
        plain = layer(x)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    tape = IndexTape(keep_outputs)
    again = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: (tape.record(), tape.replay()))
    (got,) = torch.autograd.grad(again.square().sum(), x)
    (stats,) = seen.stats
    assert stats.index.block_rows is None
    work = [stats.density, stats.tile_work.tolist(), stats.index.to_mask().sum().item()]
    with tape.replay():
        return work, torch.equal(got, expected), tape.read().index.nbytes()


@pytest.mark.parametrize("keep_outputs", [False, True])
def test_block_lists_are_whole_for_observers_and_local_on_the_tape(
    pool: ProcessPool, keep_outputs: bool
) -> None:
    first, second = pool.run(listed_job, world=2, keep_outputs=keep_outputs)
    assert first == second, "every rank must report the same"
    (density, work, _), unchanged, held = first
    assert unchanged
    assert sum(map(sum, work)) == pytest.approx(density * 4 * 16 * 17 / 2)
    assert held == 4 * (
        16 + 8 * 2
    )  # a head: 16 diagonals, and 2 bytes of bits for each of the rank's 8 query blocks


def test_calls_seen_together_are_told_as_if_each_were_alone() -> None:
    """The observer looks at indices of like shapes at once; here two are alike, and one has other columns."""
    patterns = [
        VerticalSlash(**OPTIONS | {"top_p": 0.3}),
        VerticalSlash(**OPTIONS | {"top_p": 0.6}),
        build_pattern("a_shape", block_size=8),
    ]
    inputs = [
        torch.randn(1, 64, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2)
    ]

    def call(pattern: Pattern) -> None:
        sparse_ring_attention(
            3 * inputs[0], inputs[1], inputs[1], pattern=pattern, layout="contiguous", mesh=None
        )

    alone = []
    for pattern in patterns:
        with Observer() as one:
            call(pattern)
        alone += one.stats
    with Observer() as together:
        for pattern in patterns:
            call(pattern)
    assert together.calls == 3 and len(together.stats) == len(together.stats) == 3
    for found, expected in zip(together.stats, alone, strict=True):
        mask = expected.index.density().mean().item()
        assert found.density == pytest.approx(expected.density) == pytest.approx(mask)
        assert found.columns == expected.index.column_counts.double().mean().item()
        assert torch.equal(found.tile_work, expected.tile_work)
    assert len({round(one.density, 6) for one in alone}) == 3
