"""Whole-model gradients equal single-process transformers at any dp, cp, topology, layout and label mask."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tiny_models import (
    BLOCK,
    DENSE,
    EXPERTS,
    FAMILIES,
    MORE_FAMILIES,
    SEQ_LEN,
    SPARSE,
    Batch,
    plain_gradients,
    relative_errors,
    tiny_batch,
    tiny_model,
)
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import parallelize
from mtraining.pattern import build_pattern
from mtraining.ring import Ring, sparse_ring_attention

# Norms and softmax of the models are in fp32 even when weights are fp64, so fp32 round-off it is.
TOLERANCE = 3e-6
TOPOLOGIES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "cp1": ((1,), ("cp",)),
    "cp2": ((2,), ("cp",)),
    "cp4": ((4,), ("cp",)),
    "dp2": ((2,), ("dp",)),
    "dp1xcp2": ((1, 2), ("dp", "cp")),
    "dp2xcp2": ((2, 2), ("dp", "cp")),
    "cp2x2": ((2, 2), ("cp_outer", "cp_inner")),
    "dp2xcp2x2": ((2, 2, 2), ("dp", "cp_outer", "cp_inner")),
}


def take(batch: Batch, layout: Any, mesh: Any) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows and tokens."""
    sizes = dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True))
    dp = sizes.pop("dp", 1)
    cp = mesh.size() // dp
    place = int((mesh.mesh.flatten() == dist.get_rank()).nonzero())
    rows = slice(place // cp * len(batch.labels) // dp, (place // cp + 1) * len(batch.labels) // dp)
    cp_dims = tuple(name for name in mesh.mesh_dim_names if name != "dp")
    rank = Ring.over(mesh[cp_dims] if cp_dims else None).rank
    parts = (batch.input_ids, batch.position_ids, batch.labels)
    return tuple(layout.shard(part[rows], rank, cp) for part in parts)  # type: ignore[return-value]


def sharded_gradients(
    worker: Worker, family: str, topology: str, pattern: dict[str, Any], layout: str, recompute: str = "none"
) -> tuple[float, dict[str, Tensor]]:
    """Job: loss and full gradients of the model on this topology (gradients from rank 0 only)."""
    mesh = worker.mesh(*TOPOLOGIES[topology])
    unit = pattern["block_size"]
    dealt = build_layout(layout, unit)
    model = parallelize(
        tiny_model(family),
        mesh,
        pattern=build_pattern(**pattern),
        layout=dealt,
        recompute=recompute,  # type: ignore[arg-type]
        reduce_dtype=torch.float64,
        loss_chunk=40,
    )
    batch = tiny_batch()
    share = model(*take(batch, dealt, mesh), batch.num_labels)
    share.backward()
    loss = share.detach().clone()
    dist.all_reduce(loss)
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.hf_model.named_parameters()}
    assert all(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in model.parameters())
    return loss.item(), gradients if worker.rank == 0 else {}


def expected_gradients(family: str, pattern: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Plain transformers, given the masks that the sparse pattern picks in a single process."""
    batch, masks = tiny_batch(), []
    if pattern["name"] != "dense":

        def spy(*args: Any, **kwargs: Any) -> Tensor:
            out, index = sparse_ring_attention(*args, **kwargs, return_index=True)
            masks.append(index.to_mask())
            return out

        model = parallelize(tiny_model(family), pattern=build_pattern(**pattern), recompute="none")
        with mock.patch("mtraining.ring.op.sparse_ring_attention", spy):
            model.hidden_states(batch.input_ids, batch.position_ids)
        calls = len(masks) // 2  # of a layer, alike but for their values
        assert all(torch.equal(mask, masks[i - i % calls]) for i, mask in enumerate(masks))
        masks = masks[::calls]
        assert len(masks) == 2
        densities = [
            mask.sum().item() / mask[:, :, 0, 0].numel() / (SEQ_LEN * (SEQ_LEN + 1) / 2) for mask in masks
        ]
        assert all(density < 0.8 for density in densities), (
            densities
        )  # a mask that hides nothing would test nothing
    return plain_gradients(tiny_model(family), batch, masks or None)


@pytest.fixture(scope="module")
def oracle() -> dict[tuple[str, str], tuple[float, dict[str, Tensor]]]:
    return {}


def check(pool: ProcessPool, oracle: dict[Any, Any], family: str, topology: str, **options: Any) -> None:
    # Experts compute in fp32, here and in the oracle. Rounding alone, from products taken the other way round, moved
    # gradients of granitemoe by up to 1.3e-5.
    pattern, tolerance = options["pattern"], 3e-5 if family in EXPERTS else TOLERANCE
    key = (family, pattern["name"])
    if key not in oracle:
        oracle[key] = expected_gradients(family, pattern)
    expected_loss, expected = oracle[key]
    world = 1
    for size in TOPOLOGIES[topology][0]:
        world *= size
    (loss, gradients), *others = pool.run(
        sharded_gradients, world=world, family=family, topology=topology, **options
    )
    assert all(other[0] == pytest.approx(loss, rel=1e-12) for other in others)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    errors = relative_errors(gradients, expected)
    assert max(errors.values()) < tolerance, {
        name: error for name, error in errors.items() if error >= tolerance
    }


@pytest.mark.parametrize("pattern", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gradients_on_every_topology(
    pool: ProcessPool, oracle: dict[Any, Any], topology: str, pattern: dict[str, Any]
) -> None:
    check(pool, oracle, "qwen2", topology, pattern=pattern, layout="striped")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen2"}))
@pytest.mark.parametrize("pattern", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_gradients_of_every_family(
    pool: ProcessPool, oracle: dict[Any, Any], family: str, pattern: dict[str, Any]
) -> None:
    check(pool, oracle, family, "dp2xcp2", pattern=pattern, layout="striped", recompute="full")


@pytest.mark.parametrize("family", [*MORE_FAMILIES, *EXPERTS])
def test_gradients_of_more_families(pool: ProcessPool, oracle: dict[Any, Any], family: str) -> None:
    check(pool, oracle, family, "cp2", pattern=SPARSE, layout="striped", recompute="full")


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_gradients_in_other_layouts(pool: ProcessPool, oracle: dict[Any, Any], layout: str) -> None:
    check(pool, oracle, "qwen2", "cp2", pattern=SPARSE, layout=layout)


def test_a_rank_of_early_positions_takes_the_frequencies_of_the_whole(
    pool: ProcessPool, oracle: dict[Any, Any]
) -> None:
    """The first of four contiguous ranks sees no position beyond Phi-3's original context."""
    assert tiny_model("phi3").config.rope_parameters["original_max_position_embeddings"] == SEQ_LEN // 4
    check(pool, oracle, "phi3", "cp4", pattern=DENSE, layout="contiguous")


def submesh(worker: Worker) -> tuple[float, dict[str, Tensor]]:
    """Job: two copies of dp 1 x cp 2 in a world of four, on slices of one mesh."""
    mesh = worker.mesh((2, 1, 2), ("copy", "dp", "cp"))["dp", "cp"]
    layout = build_layout("striped", SPARSE["block_size"])
    model = parallelize(
        tiny_model("qwen2"), mesh, pattern=build_pattern(**SPARSE), layout=layout, reduce_dtype=torch.float64
    )
    batch = tiny_batch()
    share = model(*take(batch, layout, mesh), batch.num_labels)
    share.backward()
    assert model.fsdp_mesh is not None and model.fsdp_mesh.size() == 2
    return 0.0, {name: parameter.grad.full_tensor() for name, parameter in model.hf_model.named_parameters()}


def test_gradients_on_a_part_of_the_world(pool: ProcessPool) -> None:
    _, expected = expected_gradients("qwen2", SPARSE)
    for _, gradients in pool.run(submesh, world=4):
        assert max(relative_errors(gradients, expected).values()) < TOLERANCE


def misdealt(worker: Worker) -> None:
    """Job: every rank is handed the other one's tokens."""
    layout = build_layout("striped", BLOCK)
    model = parallelize(tiny_model("qwen2"), worker.mesh(), pattern=build_pattern(**SPARSE), layout=layout)
    batch = tiny_batch()
    inputs = (
        layout.shard(part, 1 - worker.rank, 2) for part in (batch.input_ids, batch.position_ids, batch.labels)
    )
    model(*inputs, batch.num_labels)


def test_tokens_of_another_rank_are_refused(pool: ProcessPool) -> None:
    with pytest.raises(UserError, match=r"layout 'striped' deals to context-parallel rank \d of 2"):
        pool.run(misdealt, world=2)
