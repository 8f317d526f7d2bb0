"""Compiled layers: one graph for all of them, without a break, and the numbers of eager mode."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from packaging.version import Version
from test_gradients import TOPOLOGIES, take
from tiny_models import DENSE, EXPERTS, SPARSE, relative_errors, tiny_batch, tiny_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from distributed import ProcessPool, Worker
from library_warnings import COMPILE
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import parallel, parallelize
from mtraining.model.fused import fuse
from mtraining.pattern import build_pattern
from mtraining.ring import Observer

pytestmark = pytest.mark.filterwarnings(*COMPILE)


def step(
    worker: Worker, topology: str | None, recompute: Any, backend: str | None, family: str = "qwen2"
) -> tuple[float, dict[str, Tensor], list[float], int]:
    """Job: loss and gradients of one step, densities of its layers, and graphs compiled; no backend is eager mode."""
    torch._dynamo.reset()
    mesh = worker.mesh(*TOPOLOGIES[topology]) if topology else None
    layout = build_layout("striped", SPARSE["block_size"])
    model = tiny_model(family)
    compiler = CompileCounterWithBackend(backend or "eager")
    with mock.patch.object(parallel, "fuse", functools.partial(fuse, backend=compiler)):
        made = parallelize(
            model,
            mesh,
            pattern=build_pattern(**SPARSE),
            layer_patterns={1: build_pattern(**DENSE)},
            layout=layout,
            recompute=recompute,
            fused="compile" if backend else "none",
        )
    batch = tiny_batch()
    inputs = take(batch, layout, mesh) if mesh else (batch.input_ids, batch.position_ids, batch.labels)
    with Observer() as seen:
        loss = made(*inputs, batch.num_labels)
        loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradients[name] = parameter.grad.full_tensor() if mesh else parameter.grad
    return loss.item(), gradients, [stats.density for stats in seen.stats], compiler.frame_count


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, recompute, backend",
    [
        (None, "none", "aot_eager"),
        (None, "full", "aot_eager"),
        (None, "keep_attention", "aot_eager"),
        (None, "full", "inductor"),
        ("cp2", "full", "aot_eager"),
        ("cp2", "keep_attention", "aot_eager"),
    ],
)
def test_compiled_layers_equal_eager_ones(
    pool: ProcessPool, topology: str | None, recompute: str, backend: str
) -> None:
    world = 2 if topology else 1
    eager, compiled = (
        pool.run(step, world=world, topology=topology, recompute=recompute, backend=which)[0]
        for which in (None, backend)
    )
    loss, gradients, densities, _ = eager
    compiled_loss, compiled_gradients, compiled_densities, graphs = compiled
    tolerance = 1e-12 if backend == "aot_eager" else 1e-5  # norms and rotary angles are fp32 in any model
    assert compiled_loss == pytest.approx(loss, rel=tolerance)
    errors = relative_errors(compiled_gradients, gradients)
    assert max(errors.values()) <= tolerance, errors
    assert compiled_densities == densities and len(densities) == 2
    assert graphs == 2  # one of two layers with different patterns and their recompute, one of the final norm


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        *("gemma", "gpt_neox", "phi3", "gpt_oss"),
        *(pytest.param(name, marks=pytest.mark.sweep) for name in ("glm4", "jetmoe", "smollm3")),
        *(pytest.param(name, marks=pytest.mark.sweep) for name in EXPERTS if name != "gpt_oss"),
    ],
)
def test_layers_of_other_families_compile_whole(pool: ProcessPool, family: str) -> None:
    older = Version(transformers.__version__) < Version("5.23")
    if older and family in EXPERTS and family != "llama4_text":
        # Their experts on a CPU read numbers of tokens from tensors there, which no compiled graph can.
        with pytest.raises(UserError, match=f"torch.compile cannot serve the layers of {family} here"):
            pool.run(step, world=1, topology=None, recompute="none", backend="aot_eager", family=family)
        return
    (loss, gradients, *_), (compiled_loss, compiled, *_) = (
        pool.run(step, world=1, topology=None, recompute="none", backend=which, family=family)[0]
        for which in (None, "aot_eager")
    )
    assert compiled_loss == pytest.approx(loss, rel=1e-6)
    assert max(relative_errors(compiled, gradients).values()) < 1e-5


def test_the_whole_decoder_is_one_graph() -> None:
    batch, results = tiny_batch(), []
    for compiling in (False, True):
        model = tiny_model("qwen2")
        made = parallelize(model, pattern=build_pattern(**SPARSE), recompute="none")
        if compiling:
            model.model.compile(fullgraph=True, backend="aot_eager")
        loss = made(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels)
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (compiled_loss, compiled_gradients) = results
    assert compiled_loss == pytest.approx(loss, rel=1e-12)
    assert max(relative_errors(compiled_gradients, gradients).values()) <= 1e-12


@pytest.mark.parametrize("recompute", ["full", "keep_attention"])
def test_recompute_inside_compiled_code_is_refused(recompute: Any) -> None:
    model = tiny_model("qwen2")
    made, batch = parallelize(model, pattern=build_pattern(**SPARSE), recompute=recompute), tiny_batch()
    model.model.layers[0].compile(backend="aot_eager")
    with pytest.raises(
        torch._dynamo.exc.BackendCompilerFailed, match="recompute: compiled code cannot contain it"
    ):
        made(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels)


def test_layers_that_do_not_compile_are_refused() -> None:
    model, batch = tiny_model("qwen2"), tiny_batch()
    plain = model.model.layers[1].forward

    def breaks(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return plain(*args, **kwargs)

    model.model.layers[1].forward = breaks
    made = parallelize(model, pattern=build_pattern(**SPARSE), recompute="none", fused="compile")
    with pytest.raises(
        UserError, match=r"train.fused: torch.compile cannot serve the layers of qwen2 here \(.*fused=none"
    ):
        made(batch.input_ids, batch.position_ids, batch.labels, batch.num_labels)


def test_unknown_fusion_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"train.fused='some' is not known; choose one of none, compile, liger"
    ):
        parallelize(tiny_model("qwen2"), fused="some")  # type: ignore[arg-type]
