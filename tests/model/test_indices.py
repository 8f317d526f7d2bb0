"""Indices over the steps of training: refreshed or held, covered, counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_model
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.model import ParallelLM, Refresh, parallelize
from mtraining.pattern import Dense, Pattern, ToeplitzRandom, VerticalSlash, build_pattern
from mtraining.ring import Observer, Ring
from pattern_cases import Counting

TOKENS, BLOCK = 128, 8
OPTIONS: dict[str, Any] = {
    "block_size": BLOCK,
    "top_p": 0.3,
    "max_columns": 9,
    "slash_by": "block",
    "slash_density": 0.2,
    "sinks": 2,
    "window": 3,
}


# moba lists blocks, which each rank holds its rows of
HELD: list[Pattern] = [
    VerticalSlash(**OPTIONS),
    build_pattern("moba", block_size=BLOCK, chunk=2 * BLOCK, top_k=2),
]


def batch(seed: int, rows: int = 1, tokens: int = TOKENS) -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "position_ids": torch.arange(tokens).expand(rows, -1), "labels": ids}


def step(model: ParallelLM, number: int, seeds: list[int], rows: int = 1) -> list[list[SparseIndex]]:
    """One optimizer step without the optimizer: the indices of each micro-batch, by layer."""
    seen = []
    with model.training_step(number):
        for seed in seeds:
            with Observer() as observer:
                share = model(**batch(seed, rows), num_labels=100)
            share.backward()
            seen.append([stats.index for stats in observer.stats])
    return seen


def same(a: SparseIndex, b: SparseIndex, row: int = 0) -> bool:
    if a.blocks is not None and b.blocks is not None and not torch.equal(a.blocks[row], b.blocks[0]):
        return False
    return torch.equal(a.diagonals[row], b.diagonals[0]) and torch.equal(a.columns[row], b.columns[0])


@pytest.mark.parametrize("recompute", ["none", "full", "keep_attention"])
def test_frozen_indices_are_those_of_the_steps_first_sequence(recompute: Any) -> None:
    pattern = Counting(**OPTIONS)
    model = parallelize(tiny_model("qwen3"), pattern=pattern, refresh={"frozen_at": 2}, recompute=recompute)
    first = step(model, 1, [1])
    second = step(model, 2, [2, 3], rows=2)
    estimates = len(pattern.calls)
    later = [step(model, 3, [4], rows=2), step(model, 9, [5])]
    assert len(pattern.calls) == estimates == 2 * 3
    assert not same(first[0][0], second[0][0]) and not same(second[1][0], second[0][0])
    for layer in range(2):
        assert all(same(later[0][0][layer], second[0][layer], row) for row in range(2))
        assert same(later[1][0][layer], second[0][layer])
    assert later[0][0][0].columns.shape[0] == 2


def test_every_n_estimates_at_steps_1_and_1_plus_n() -> None:
    pattern = Counting(**OPTIONS)
    model = parallelize(tiny_model("qwen3"), pattern=pattern, refresh={"every_n": 3}, recompute="none")
    counts = []
    for number in range(1, 8):
        step(model, number, [number])
        counts.append(len(pattern.calls) // 2)
    assert counts == [1, 1, 1, 2, 2, 2, 3]


def test_evaluation_estimates_for_itself() -> None:
    pattern = Counting(**OPTIONS)
    model = parallelize(
        tiny_model("qwen3"),
        pattern=pattern,
        refresh={"frozen_at": 1},
        coverage=4,
        recompute="none",
        layout="contiguous",
    )
    step(model, 1, [1])
    step(model, 2, [2])
    with Observer() as seen:
        model.token_losses(**batch(7, tokens=64))
    assert len(pattern.calls) == 4
    assert seen.stats[0].index.num_blocks == 8
    alone = parallelize(
        tiny_model("qwen3"), pattern=VerticalSlash(**OPTIONS), recompute="none", layout="contiguous"
    )
    with Observer() as expected:
        alone.token_losses(**batch(7, tokens=64))
    assert same(seen.stats[0].index, expected.stats[0].index)


def test_coverage_reaches_every_distance_in_every_head() -> None:
    steps = 5
    plain = parallelize(tiny_model("qwen3"), pattern=VerticalSlash(**OPTIONS), recompute="none")
    covered = parallelize(
        tiny_model("qwen3"), pattern=VerticalSlash(**OPTIONS), coverage=steps, recompute="none"
    )
    reached = torch.zeros(4, TOKENS // BLOCK, dtype=torch.bool)
    for number in range(3, 3 + steps):
        before, after = (step(model, number, [1])[0][0].diagonals[0] for model in (plain, covered))
        extra = after & ~before
        assert (after >= before).all()
        assert (extra.sum(1) <= -(-TOKENS // BLOCK // steps)).all()
        assert not torch.equal(extra[0], extra[1]), "heads must differ within a step"
        reached |= extra | before
    assert reached.all()
    assert not (before.all() or after.all())


def test_uncovered_counts_distances_without_a_slash() -> None:
    pattern = ToeplitzRandom(block_size=BLOCK, density=0.3, window=2, columns=0, seed=4)
    model = parallelize(tiny_model("qwen3"), pattern=pattern, recompute="none")
    index = step(model, 1, [1])[0][0]
    found = model.indices.uncovered(TOKENS)
    missed = ~index.diagonals[0]
    assert found["uncovered"] == found["uncovered_run"] == pytest.approx(missed.float().mean().item())
    assert found["uncovered_far"] == pytest.approx(missed[:, TOKENS // 2 // BLOCK :].float().mean().item())
    assert 0 < found["uncovered"] < 1


def test_uncovered_run_falls_as_coverage_goes_round() -> None:
    model = parallelize(tiny_model("qwen3"), pattern=VerticalSlash(**OPTIONS), coverage=4, recompute="none")
    shares = []
    for number in range(1, 5):
        step(model, number, [1])
        shares.append(model.indices.uncovered(TOKENS))
    run = [share["uncovered_run"] for share in shares]
    assert run == sorted(run, reverse=True) and run[0] > 0.2 and run[-1] == 0
    assert all(share["uncovered"] > 0.2 for share in shares)


def test_state_goes_round() -> None:
    pattern = VerticalSlash(**OPTIONS)
    old = parallelize(tiny_model("qwen3"), pattern=pattern, refresh={"frozen_at": 1}, recompute="none")
    expected = step(old, 1, [1])[0]
    new = parallelize(tiny_model("qwen3"), pattern=pattern, refresh={"frozen_at": 1}, recompute="none")
    with pytest.raises(UserError, match="step 2 needs the indices of step 1, .* holds those of no step"):
        step(new, 2, [2])
    new.indices.restore(old.indices.state(), torch.device("cpu"))
    assert all(same(got, want) for got, want in zip(step(new, 2, [2])[0], expected, strict=True))
    assert new.indices.uncovered(TOKENS)["uncovered_run"] == old.indices.uncovered(TOKENS)["uncovered_run"]
    later = parallelize(tiny_model("qwen3"), pattern=pattern, refresh={"frozen_at": 4}, recompute="none")
    later.indices.restore(old.indices.state(), torch.device("cpu"))
    counted = later.indices.uncovered(TOKENS)
    assert counted["uncovered_run"] == old.indices.uncovered(TOKENS)["uncovered_run"]
    with pytest.raises(UserError, match="step 6 needs the indices of step 4, .* holds those of 1"):
        step(later, 6, [2])


@pytest.mark.parametrize("pattern", [Dense(block_size=BLOCK), VerticalSlash(**OPTIONS)], ids=lambda p: p.name)
def test_a_restored_index_is_dense_if_it_was(pattern: Pattern) -> None:
    """Or a resumed run would compute it with another kernel."""
    old, new = (
        parallelize(tiny_model("qwen3"), pattern=pattern, refresh={"frozen_at": 1}, recompute="none")
        for _ in "12"
    )
    step(old, 1, [1])
    new.indices.restore(old.indices.state(), torch.device("cpu"))
    for memory in (old.indices, new.indices):
        assert memory._held
        assert all(index.dense == isinstance(pattern, Dense) for index in memory._held.values())


def replicas_job(
    worker: Worker, pattern: Pattern
) -> tuple[list[SparseIndex], dict[str, float], list[SparseIndex]]:
    """Two replicas with different data, each on two ranks: the indices of step 2, and of step 1 for comparison."""
    mesh = worker.mesh((2, 2), ("dp", "cp"))
    model = parallelize(
        tiny_model("qwen3"), mesh, pattern=pattern, layout=build_layout("striped", BLOCK),
        refresh={"frozen_at": 1}, recompute="none",
    )  # fmt: skip
    rank, layout, seen = Ring.over(mesh["cp"]).rank, build_layout("striped", BLOCK), []
    for number in (1, 2):
        whole = batch(10 * number + mesh.get_local_rank("dp"))
        mine = {name: layout.shard(x, rank, 2).contiguous() for name, x in whole.items()}
        with model.training_step(number), Observer() as observer:
            model(**mine, num_labels=200).backward()
        seen.append([stats.index for stats in observer.stats])
    return seen[1], model.indices.uncovered(TOKENS), seen[0]


@pytest.mark.parametrize("pattern", HELD, ids=lambda p: p.name)
def test_all_replicas_hold_the_indices_of_the_first(pool: ProcessPool, pattern: Pattern) -> None:
    ranks = pool.run(replicas_job, world=4, pattern=pattern)
    first = ranks[0][2]
    assert not same(first[0], ranks[2][2][0]), "the replicas' own indices differ"
    for held, uncovered, _ in ranks:
        assert all(same(got, want) for got, want in zip(held, first, strict=True))
        assert uncovered == ranks[0][1]


def held_job(worker: Worker, topology: tuple[int, ...], state: dict[str, Tensor] | None) -> Any:
    """Without ``state``: its state after a step that estimates. With it: the indices of a step on another text."""
    names = ("cp_outer", "cp_inner") if len(topology) > 1 else ("cp",)
    mesh = worker.mesh(topology, names) if worker.world > 1 else None
    layout, ring = build_layout("striped", BLOCK), Ring.over(mesh)
    model = parallelize(
        tiny_model("qwen3"), mesh, pattern=HELD[1], layout=layout, refresh={"frozen_at": 1}, recompute="none",
        fsdp=False,
    )  # fmt: skip
    if state is not None:
        model.indices.restore(state, torch.device("cpu"))
    number = 1 if state is None else 2
    mine = {name: layout.shard(x, ring.rank, ring.world).contiguous() for name, x in batch(number).items()}
    with model.training_step(number), Observer() as observer:
        model(**mine, num_labels=100).backward()
    return [stats.index for stats in observer.stats], model.indices.state()


@pytest.mark.parametrize("topology", [(1,), (2,), (2, 2)], ids=str)
def test_held_block_lists_go_on_in_any_ring(pool: ProcessPool, topology: tuple[int, ...]) -> None:
    """Estimated by two ranks, each with half of the rows; gone on with by ranks that need others, and saved again."""
    saved = pool.run(held_job, world=2, topology=(2,), state=None)
    for got, again in pool.run(held_job, world=math.prod(topology), topology=topology, state=saved[1][1]):
        assert all(same(index, first) for index, first in zip(got, saved[0][0], strict=True))
        assert all(torch.equal(again[name], x) for name, x in saved[0][1].items())
    other = parallelize(tiny_model("qwen3"), pattern=HELD[1], recompute="none", layout="contiguous")
    assert not same(step(other, 1, [2])[0][0], saved[0][0][0]), "another text has another index"


@pytest.mark.parametrize(
    "value", ["sometimes", {"every_n": 0}, {"every": 2}, {"every_n": 2, "frozen_at": 3}, 4]
)
def test_unknown_refreshes_are_refused(value: Any) -> None:
    with pytest.raises(UserError, match="pattern.refresh: .* use every_step, "):
        Refresh.parse(value)


def test_what_cannot_be_held_is_refused() -> None:
    model = parallelize(
        tiny_model("qwen3"), pattern=VerticalSlash(**OPTIONS), refresh={"frozen_at": 1}, layout="contiguous"
    )
    with pytest.raises(UserError, match=r"with model.training_step\(step\)"):
        model(**batch(1), num_labels=10)
    step(model, 1, [1])
    with model.training_step(2), pytest.raises(UserError, match="for 128 tokens and this batch has 64"):
        model(**batch(1, tokens=64), num_labels=10)
    with pytest.raises(UserError, match="pattern.coverage=-1"):
        parallelize(tiny_model("qwen3"), coverage=-1)
