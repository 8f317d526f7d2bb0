"""Budgets over training: which steps are dense, how sparsity grows, and what neither of them touches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_indices import BLOCK, OPTIONS, batch, same, step
from tiny_models import tiny_model

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.model import Anneal, parallelize
from mtraining.model.anneal import widened
from mtraining.pattern import Dense, PerHead, VerticalSlash, build_pattern
from mtraining.ring import Observer, Ring
from pattern_cases import Counting


def test_which_steps_are_dense() -> None:
    anneal = Anneal(dense_first=2, dense_every=4)
    assert [number for number in range(1, 13) if anneal.dense(number)] == [1, 2, 4, 8, 12]
    assert not any(Anneal().dense(number) for number in range(1, 13))


def test_the_factor_falls_by_one_ratio_to_one() -> None:
    anneal = Anneal(widen=16, widen_steps=4)
    assert [anneal.factor(number) for number in range(1, 8)] == pytest.approx([16, 8, 4, 2, 1, 1, 1])
    assert Anneal().factor(1) == 1


def test_every_budget_is_widened_and_the_share_of_mass_stays() -> None:
    pattern = VerticalSlash(top_p=0.9, max_columns=100, max_slashes=200, slash_density=0.3)
    found = widened(pattern, 2.0)
    assert (found.max_columns, found.max_slashes, found.slash_density, found.top_p) == (200, 400, 0.6, 0.9)
    assert widened(pattern, 8.0).slash_density == 1.0
    fixed = VerticalSlash(top_p=None, top_k_columns=50, top_k_slashes=150)
    assert (widened(fixed, 1.5).top_k_columns, widened(fixed, 1.5).top_k_slashes) == (75, 225)
    assert widened(build_pattern("moba", top_k=3), 2.0).top_k == 6
    both = PerHead(heads=(pattern, fixed))
    assert widened(both, 2.0).heads == (widened(pattern, 2.0), widened(fixed, 2.0))
    assert widened(Dense(), 3.0) == Dense()


def test_bad_options_are_one_sentence() -> None:
    for options in ({"widen": 4.0}, {"widen_steps": 9}):
        with pytest.raises(UserError, match="belong together"):
            Anneal(**options)
    with pytest.raises(UserError, match="widen=0.5"):
        Anneal(widen=0.5, widen_steps=3)
    with pytest.raises(UserError, match="xattention has no budget to widen; .*dense_first"):
        parallelize(tiny_model("qwen3"), pattern="xattention", anneal=Anneal(widen=2.0, widen_steps=2))


@pytest.mark.parametrize("recompute", ["none", "full", "keep_attention"])
def test_a_dense_step_trains_as_dense_attention_does(recompute: Any) -> None:
    """Loss and gradients, bit for bit; and the steps around it are the pattern's own."""
    annealed = parallelize(
        tiny_model("qwen3"),
        pattern=VerticalSlash(**OPTIONS),
        anneal=Anneal(dense_every=2),
        recompute=recompute,
    )
    dense = parallelize(tiny_model("qwen3"), pattern=Dense(block_size=BLOCK), recompute=recompute)
    sparse = parallelize(tiny_model("qwen3"), pattern=VerticalSlash(**OPTIONS), recompute=recompute)
    gradients = []
    for number, model in ((2, annealed), (2, dense), (3, annealed), (3, sparse)):
        model.zero_grad(set_to_none=True)
        found = step(model, number, [1])
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert found[0][0].dense == (model is dense or (model is annealed and number == 2))
    for one, other in zip(gradients[0], gradients[1], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(gradients[2], gradients[3], strict=True):
        assert torch.equal(one, other)
    assert not all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[2], strict=True))


def test_a_dense_step_still_estimates_what_later_steps_hold() -> None:
    pattern = Counting(**OPTIONS)
    model = parallelize(
        tiny_model("qwen3"),
        pattern=pattern,
        refresh={"frozen_at": 2},
        anneal=Anneal(dense_first=3),
        recompute="none",
    )
    assert step(model, 1, [1])[0][0].dense
    # Only the step's first batch is held, so the second is not estimated.
    assert step(model, 2, [2, 5])[0][0].dense
    estimates = len(pattern.calls)
    # Step 3 has its index held already and is dense, so that nothing is estimated.
    assert step(model, 3, [3])[0][0].dense
    held = step(model, 4, [4])[0]
    assert len(pattern.calls) == estimates == 4
    alone = parallelize(tiny_model("qwen3"), pattern=VerticalSlash(**OPTIONS), recompute="none")
    with Observer() as seen:
        alone(**batch(2), num_labels=100)
    assert not held[0].dense and same(held[0], seen.stats[0].index)


def test_sparsity_grows_as_budgets_shrink() -> None:
    model = parallelize(
        tiny_model("qwen3"),
        pattern=VerticalSlash(**OPTIONS | {"top_p": 1.0}),
        anneal=Anneal(widen=4.0, widen_steps=3),
        recompute="none",
    )
    plain = parallelize(
        tiny_model("qwen3"), pattern=VerticalSlash(**OPTIONS | {"top_p": 1.0}), recompute="none"
    )
    found = [step(model, number, [1])[0] for number in (1, 2, 3, 4, 5)]
    density = [layers[0].density().mean().item() for layers in found]
    assert density[0] > density[1] > density[2] > density[3] == density[4]
    expected = step(plain, 4, [1])[0]
    assert all(same(one, other) for one, other in zip(found[3], expected, strict=True))


def test_steps_must_be_told_and_evaluation_is_the_pattern_alone() -> None:
    model = parallelize(
        tiny_model("qwen3"), pattern=VerticalSlash(**OPTIONS), anneal=Anneal(dense_first=9), recompute="none"
    )
    with pytest.raises(UserError, match="training_step"):
        model(**batch(1), num_labels=100)
    step(model, 1, [1])
    with Observer() as seen:
        model.token_losses(**batch(1))
    assert not seen.stats[0].index.dense


def test_a_dense_step_reaches_every_distance() -> None:
    model = parallelize(
        tiny_model("qwen3"), pattern=VerticalSlash(**OPTIONS), anneal=Anneal(dense_every=2), recompute="none"
    )
    step(model, 1, [1])
    assert model.indices.uncovered(128)["uncovered_run"] > 0
    step(model, 2, [1])
    assert model.indices.uncovered(128)["uncovered_run"] == 0


def annealed_job(
    worker: Worker, topology: tuple[int, ...], anneal: Anneal
) -> list[tuple[list[SparseIndex], torch.Tensor]]:
    """Of three steps on a ring: the index of each layer, and the whole gradient of the embedding."""
    names = ("cp_outer", "cp_inner") if len(topology) > 1 else ("cp",)
    mesh = worker.mesh(topology, names) if worker.world > 1 else None
    layout, ring = build_layout("striped", BLOCK), Ring.over(mesh)
    model = parallelize(
        tiny_model("qwen3").double(), mesh, pattern=VerticalSlash(**OPTIONS), layout=layout, anneal=anneal,
        recompute="keep_attention", fsdp=False,
    )  # fmt: skip
    weight, found = model.hf_model.get_input_embeddings().weight, []
    for number in (1, 2, 3):
        mine = {
            name: layout.shard(x, ring.rank, ring.world).contiguous() for name, x in batch(number).items()
        }
        model.zero_grad(set_to_none=True)
        with model.training_step(number), Observer() as observer:
            model(**mine, num_labels=100).backward()
        if mesh is not None:
            # Each rank has the gradient of its own tokens.
            for name in names:
                torch.distributed.all_reduce(weight.grad, group=mesh.get_group(name))
        found.append(([stats.index for stats in observer.stats], weight.grad.clone()))
    return found


@pytest.mark.parametrize("topology", [(2,), (2, 2)], ids=str)
@pytest.mark.parametrize(
    ("anneal", "dense"),
    [
        (Anneal(dense_first=1, dense_every=3), [True, False, True]),
        (Anneal(widen=4.0, widen_steps=2), [False, False, False]),
    ],
    ids=["dense", "widen"],
)
def test_all_ranks_anneal_as_one_does(
    pool: ProcessPool, topology: tuple[int, ...], anneal: Anneal, dense: list[bool]
) -> None:
    """The same steps are dense on every rank, the others choose the same index, and gradients are those of one."""
    (alone,) = pool.run(annealed_job, world=1, topology=(1,), anneal=anneal)
    assert [layers[0].dense for layers, _ in alone] == dense
    for rank in pool.run(annealed_job, world=math.prod(topology), topology=topology, anneal=anneal):
        for (layers, gradient), (expected, whole) in zip(rank, alone, strict=True):
            for index, other in zip(layers, expected, strict=True):
                assert index.dense == other.dense
                assert index.dense or same(index, other)
            torch.testing.assert_close(gradient, whole, rtol=1e-9, atol=1e-12)
