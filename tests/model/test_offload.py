"""Offload changes where tensors wait, never their bits; its copies are issued in the order that hides them."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from test_gradients import TOPOLOGIES, take
from tiny_models import SPARSE, tiny_batch, tiny_model
from torch import Tensor

from distributed import ProcessPool, Worker
from library_warnings import COMPILE
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import parallel, parallelize, recompute
from mtraining.model.fused import fuse
from mtraining.model.offload import Offloader
from mtraining.model.recompute import PARTS, LayerPolicy
from mtraining.pattern import build_pattern

LAYERS = 2


class LateLane:
    """Copies that happen only when somebody waits, or when a later copy is waited for: as late as a stream may be.

    Memory that a copy still needs and somebody has written is therefore seen in the results.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.done = 0
        self.buffers: list[Tensor] = []
        self.log: list[str] = []

    def empty(self, tensor: Tensor) -> Tensor:
        self.buffers.append(torch.full_like(tensor, torch.nan))
        return self.buffers[-1]

    def out(self, tensor: Tensor, host: Tensor) -> int:
        return self._issue("out", tensor, host)

    def back(self, host: Tensor) -> tuple[Tensor, int]:
        tensor = torch.full_like(host, torch.nan)
        return tensor, self._issue("back", host, tensor)

    def wait(self, copied: int) -> None:
        self.log.append(f"wait {copied}")
        while self.done <= copied:
            source, target = self.pending[self.done]
            target.copy_(source)
            self.pending[self.done] = (torch.empty(0), torch.empty(0))
            self.done += 1

    def _issue(self, what: str, source: Tensor, target: Tensor) -> int:
        self.pending.append((source, target))
        self.log.append(f"{what} {len(self.pending) - 1}")
        return len(self.pending) - 1


def gradients(
    worker: Worker, topology: str | None, mode: Any, offload: str | None, steps: int = 1, fused: Any = "none"
) -> tuple[dict[str, Tensor], LateLane]:
    """Job: gradients of the last of some equal steps; `offload` is None, "here" (a CPU has nowhere to go) or "away"."""
    mesh = worker.mesh(*TOPOLOGIES[topology]) if topology else None
    layout = build_layout("striped", SPARSE["block_size"])
    lane = LateLane()

    def make(device: torch.device) -> Offloader:
        return Offloader(lane if offload == "away" else None)

    compiler = functools.partial(fuse, backend="aot_eager")
    with mock.patch.object(recompute, "make_offloader", make), mock.patch.object(parallel, "fuse", compiler):
        model = parallelize(
            tiny_model("qwen2", "float32"),
            mesh,
            pattern=build_pattern(**SPARSE),
            layout=layout,
            recompute=mode,
            offload=offload is not None and isinstance(mode, str),
            fused=fused,
        )
    batch = tiny_batch()
    inputs = take(batch, layout, mesh) if mesh else (batch.input_ids, batch.position_ids, batch.labels)
    for _ in range(steps):
        model.zero_grad()
        model(*inputs, batch.num_labels).backward()
    found = {}
    for name, parameter in model.hf_model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.full_tensor() if mesh else parameter.grad
    return found, lane


@pytest.mark.parametrize("topology", [None, "cp2"])
@pytest.mark.parametrize("mode", ["full", "keep_attention"])
def test_the_same_bits(pool: ProcessPool, topology: str | None, mode: str) -> None:
    def run(offload: str | None, steps: int) -> dict[str, Tensor]:
        world = 2 if topology else 1
        return pool.run(gradients, world=world, topology=topology, mode=mode, offload=offload, steps=steps)[
            0
        ][0]

    expected = run(None, 1)
    for offload, steps in (("here", 1), ("away", 2)):
        for name, gradient in run(offload, steps).items():
            assert torch.equal(gradient, expected[name]), (offload, name)


@pytest.mark.parametrize("mode, kept", [("full", 1), ("keep_attention", 3)])
def test_all_but_the_last_layer_leave_and_buffers_serve_again(mode: str, kept: int) -> None:
    _, lane = gradients(mock.Mock(), None, mode, "away", steps=3)
    assert len(lane.buffers) == kept * (LAYERS - 1)  # the second step allocates none
    assert sum(entry.startswith("out") for entry in lane.log) == 3 * kept * (LAYERS - 1)
    assert sum(entry.startswith("back") for entry in lane.log) == 3 * kept * (LAYERS - 1)
    assert not any(buffer.isnan().any() for buffer in lane.buffers)


@pytest.mark.filterwarnings(*COMPILE)
def test_with_compiled_layers() -> None:
    expected, _ = gradients(mock.Mock(), None, "keep_attention", None, fused="compile")
    found, lane = gradients(mock.Mock(), None, "keep_attention", "away", fused="compile")
    assert lane.buffers
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_layers_that_keep_other_things_beside_what_leaves() -> None:
    expected, _ = gradients(mock.Mock(), None, "full", None)
    for last in (LayerPolicy(everything=True), LayerPolicy(frozenset(PARTS))):
        policies = [LayerPolicy(frozenset(PARTS), offload=True), last]
        found, lane = gradients(mock.Mock(), None, policies, "away", steps=2)
        assert len(lane.buffers) == 3  # an input, and attention's output and lse; no product
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), name


def test_each_layer_is_fetched_while_the_one_after_it_computes() -> None:
    lane = LateLane()
    offloader = Offloader(lane)
    tensors = [torch.full((3,), float(layer)) for layer in range(5)]
    kept, numbers = [], []
    for layer in range(5):
        kept.append(offloader.layer(layer, layer == 4))
        numbers.append(kept[-1].keep(tensors[layer]))
    assert [entry for entry in lane.log if entry.startswith("out")] == [f"out {n}" for n in range(4)]
    assert lane.log.index("wait 1") < lane.log.index("out 3")  # two layers at most are on their way out
    for layer in reversed(range(5)):
        lane.log.clear()
        assert torch.equal(kept[layer].take(numbers[layer]), tensors[layer])
        fetched = [entry for entry in lane.log if entry.startswith("back")]
        assert len(fetched) == (1 if layer else 0)  # the layer before; its own was on the way already
        if fetched and layer < 4:
            assert lane.log[-1].startswith("wait")  # for its own, after the other was begun
    with pytest.raises(RuntimeError, match="backward runs once through a forward"):
        kept[2].take(numbers[2])


def test_nothing_to_offload_is_refused() -> None:
    with pytest.raises(UserError, match="train.offload moves what recompute keeps, and train.recompute=none"):
        parallelize(tiny_model("qwen2"), recompute="none", offload=True)
