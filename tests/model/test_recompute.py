"""Layer recompute changes what is kept, never what is computed; it replays the recorded attention index."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from test_gradients import TOPOLOGIES, take
from tiny_models import SPARSE, tiny_batch, tiny_model
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import parallelize
from mtraining.pattern import VerticalSlash, build_pattern
from mtraining.ring import attention as ring_attention

LAYERS = 2


def counted(
    worker: Worker, topology: str | None, recompute: Any, dtype: str
) -> tuple[dict[str, Tensor], int, int]:
    """Job: gradients, how often a pattern was estimated, and how often the ring ran forward, in one step."""
    mesh = worker.mesh(*TOPOLOGIES[topology]) if topology else None
    layout = build_layout("striped", SPARSE["block_size"])
    model = parallelize(
        tiny_model("qwen2", dtype), mesh, pattern=build_pattern(**SPARSE), layout=layout, recompute=recompute
    )
    batch = tiny_batch()
    inputs = take(batch, layout, mesh) if mesh else (batch.input_ids, batch.position_ids, batch.labels)
    with (
        mock.patch.object(
            VerticalSlash, "estimate", autospec=True, side_effect=VerticalSlash.estimate
        ) as estimate,
        mock.patch.object(ring_attention, "ring_forward", side_effect=ring_attention.ring_forward) as ring,
    ):
        model(*inputs, batch.num_labels).backward()
    gradients = {}
    for name, parameter in model.hf_model.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.full_tensor() if mesh else parameter.grad
    return gradients, estimate.call_count, ring.call_count


@pytest.mark.parametrize("topology", [None, "cp2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mode_gives_the_same_bits(pool: ProcessPool, topology: str | None, dtype: str) -> None:
    world = 2 if topology else 1
    runs = {
        mode: pool.run(counted, world=world, topology=topology, recompute=mode, dtype=dtype)[0]
        for mode in ("none", "full", "keep_attention")
    }
    gradients, estimates, rings = runs["none"]
    assert (estimates, rings) == (LAYERS, LAYERS)
    for mode, expected_rings in (("full", 2 * LAYERS), ("keep_attention", LAYERS)):
        again, estimates, rings = runs[mode]
        assert estimates == LAYERS  # the replay estimates nothing
        assert rings == expected_rings
        for name, gradient in gradients.items():
            assert torch.equal(again[name], gradient), (mode, name)


def test_state_dict_keeps_the_names_of_the_model() -> None:
    names = list(tiny_model("llama").state_dict())
    model = parallelize(tiny_model("llama"), recompute="full")
    assert list(model.hf_model.state_dict()) == names
    assert list(model.state_dict()) == [f"hf_model.{name}" for name in names]


def test_no_recompute_without_gradient() -> None:
    model = parallelize(tiny_model("qwen2"), pattern=build_pattern(**SPARSE), recompute="full")
    batch = tiny_batch()
    with mock.patch("mtraining.model.recompute.checkpoint") as checkpoint:
        losses = model.token_losses(batch.input_ids, batch.position_ids, batch.labels)
    checkpoint.assert_not_called()
    share = model(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels)
    assert losses.sum().item() / batch.num_labels == pytest.approx(share.item(), rel=1e-9)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(
        UserError, match="recompute: 'some' is not known; choose one of full, keep_attention, none"
    ):
        parallelize(tiny_model("qwen2"), recompute="some")  # type: ignore[arg-type]
