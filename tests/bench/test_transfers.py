"""The two ways of transfers that the benchmark of training steps compares: what shares a communicator, and what is
gathered when. Losses and weights are the same bits in each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from distributed import ProcessPool, Worker
from mtraining.bench.options import TrainOptions
from mtraining.bench.train.cases import SHAPES, TRANSFERS, TrainCase
from mtraining.bench.train.model import (
    batches,
    build_model,
    parallel,
    process_for,
    random_sequences,
    stepper,
)
from mtraining.bench.train.run import cases_of, check
from mtraining.errors import UserError
from mtraining.model.support import layers_of
from mtraining.ring import Ring

LAYERS = 3
TINY = replace(SHAPES["tiny"], tied=False)
CASE = TrainCase(TINY, 128, 0.6, "striped", "flat", "keep_attention", LAYERS)


def model_of(case: TrainCase, worker: Worker) -> tuple[Any, Any]:
    process = process_for(case, worker.device, worker.rank, worker.world)
    return parallel(case, build_model(case.shape, case.seq_len, LAYERS, worker.device), process), process


def groups(worker: Worker, ring: str, transfers: str) -> tuple[bool, bool]:
    """Whether FSDP, and whether the ring, uses the group of all processes."""
    model, process = model_of(replace(CASE, ring=ring, transfers=transfers), worker)
    state = layers_of(model.hf_model)[0]._get_fsdp_state()
    # PyTorch 2.11 has one group of a module's parameters where later ones have several.
    of_layer = (
        state._fsdp_param_groups[0] if hasattr(state, "_fsdp_param_groups") else state._fsdp_param_group
    )
    gathers = of_layer.mesh_info.shard_process_group
    dims = tuple(name for name in process.mesh.mesh_dim_names if name != "dp")
    hops = Ring.over(process.mesh[dims])._whole_group
    assert dist.get_process_group_ranks(hops) == list(range(worker.world))
    return gathers is dist.group.WORLD, hops is dist.group.WORLD


@pytest.mark.parametrize(("ring", "world"), [("flat", 2), ("2x2", 4)])
def test_a_ring_shares_the_group_of_gathers_or_has_its_own(pool: ProcessPool, ring: str, world: int) -> None:
    assert set(pool.run(groups, world=world, ring=ring, transfers="shared")) == {(True, True)}
    assert set(pool.run(groups, world=world, ring=ring, transfers="own")) == {(True, False)}


def two_steps(worker: Worker, transfers: str) -> tuple[list[float], torch.Tensor]:
    """Losses, and every weight of this rank's shards afterwards."""
    case = replace(CASE, transfers=transfers)
    model, process = model_of(case, worker)
    step, data = stepper(case, model, process), batches(case, random_sequences(256, 128), process)
    losses = [step.run(data, number).loss for number in range(2)]
    return losses, torch.cat([p.to_local().detach().flatten() for p in model.parameters()])


def test_losses_and_weights_are_the_same_bits(pool: ProcessPool) -> None:
    found = {transfers: pool.run(two_steps, world=2, transfers=transfers) for transfers in TRANSFERS}
    start = found.pop("shared")
    for ranks in found.values():
        for (losses, weights), (expected, same) in zip(ranks, start, strict=True):
            assert losses == expected
            assert torch.equal(weights, same)
    losses = start[0][0]
    assert losses[0] != losses[1]


def order(worker: Worker, transfers: str) -> list[str]:
    """Gathers that are begun, and the ends of layers, of one step in order."""
    model, process = model_of(replace(CASE, transfers=transfers), worker)
    seen: list[str] = []
    layers = list(layers_of(model.hf_model))
    names = {id(layer): f"{number}" for number, layer in enumerate(layers)}
    plain = FSDPParamGroup.unshard

    def unshard(group: FSDPParamGroup, *args: Any, **options: Any) -> Any:
        name = names.get(id(group.modules[0]))
        if name is not None and group.is_sharded and group._all_gather_result is None:
            seen.append(f"gather {name}")
        return plain(group, *args, **options)

    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: seen.append(f"run {number}"))
    step = stepper(CASE, model, process)
    data = batches(CASE, random_sequences(256, 128), process)
    step.run(data, 0)  # the first makes FSDP's order of backward known
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FSDPParamGroup, "unshard", unshard)
        step.run(data, 1)
    return seen[seen.index("gather 0") :]


def test_prefetch_asks_for_the_next_layer_before_a_layer_runs(pool: ProcessPool) -> None:
    plain = pool.run(order, world=2, transfers="shared")[0]
    ahead = pool.run(order, world=2, transfers="shared+prefetch")[0]
    assert plain[:6] == ["gather 0", "run 0", "gather 1", "run 1", "gather 2", "run 2"]
    assert ahead[:6] == ["gather 0", "gather 1", "run 0", "gather 2", "run 1", "run 2"]
    # Backward, which runs each layer's forward again, asks one layer ahead in both.
    assert plain[6:] == ahead[6:] == ["gather 2", "gather 1", "run 2", "gather 0", "run 1", "run 0"]


def test_the_bench_varies_them_alone() -> None:
    options = TrainOptions(preset="tiny", device="cpu", layout=("striped",), transfers=("shared", "own"))
    assert [(case.density, case.transfers) for case in cases_of(options)] == [
        (None, "shared"),
        (0.4, "shared"),
        (0.4, "own"),
    ]
    with pytest.raises(UserError, match="transfers: 'both' is not known; choose one of shared, own"):
        check(replace(options, transfers=("both",)))
