"""Float8 products: which layers have them, how far they are from bf16, and what they go with."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from typing import Any
from unittest import mock

import pytest
import torch
from test_gradients import TOPOLOGIES, take
from tiny_models import DENSE, SPARSE, Batch, relative_errors, tiny_batch, tiny_model, tiny_options
from torch import Tensor, nn

from distributed import ProcessPool, Worker
from library_warnings import COMPILE
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.model import ParallelLM, build_model, parallel, parallelize
from mtraining.model.float8 import compile_linear, use_float8
from mtraining.model.float8_checks import check_float8, check_gpu
from mtraining.model.fused import fuse
from mtraining.model.products import MLP
from mtraining.model.recompute import LayerPolicy
from mtraining.model.support import layers_of
from mtraining.pattern import build_pattern

CPU, BF16 = torch.device("cpu"), torch.bfloat16
# Of a gradient's norm: a dozen products follow one another, each with operands of three bits behind the point.
ROUNDING = 0.3


def made(mesh: Any = None, float8: Any = "emulated", **options: Any) -> ParallelLM:
    """The tiny model in bf16; its master weights are fp32 where there is a mesh to gather them."""
    model = tiny_model("qwen2", "float32" if mesh is not None else "bfloat16")
    options = {"recompute": "none", "param_dtype": BF16 if mesh is not None else None, **options}
    layout = build_layout("striped", SPARSE["block_size"])
    return parallelize(model, mesh, pattern=build_pattern(**DENSE), layout=layout, float8=float8, **options)


def gradients(model: ParallelLM, batch: Batch, mesh: Any = None) -> tuple[float, dict[str, Tensor]]:
    """This rank's share of the loss, and whole gradients."""
    inputs = take(batch, model.layout, mesh) if mesh is not None else vars(batch).values()
    loss = model(*inputs, batch.num_labels)
    loss.backward()
    found = {}
    for name, parameter in model.hf_model.named_parameters():
        assert parameter.grad is not None
        found[name] = (parameter.grad.full_tensor() if mesh is not None else parameter.grad).float()
    return loss.item(), found


def step(worker: Worker, topology: str, **options: Any) -> tuple[float, dict[str, Tensor]]:
    """Job: the whole loss and gradients of one step."""
    mesh = worker.mesh(*TOPOLOGIES[topology])
    share, found = gradients(made(mesh, **options), tiny_batch(), mesh)
    total = torch.tensor(share, dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return float(total), found


def test_linear_layers_of_the_decoder_are_converted_and_nothing_else() -> None:
    model, plain = made(), made(float8="off")
    kinds = {name: type(module).__name__ for name, module in model.hf_model.named_modules()}
    converted = [name for name, kind in kinds.items() if kind == "Float8Linear"]
    assert converted == [
        name
        for name, module in plain.hf_model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    ]
    assert len(converted) == 2 * 7 and kinds["lm_head"] == "Linear"
    assert model.float8 == "float8, emulated: 14 linear layers of the decoder"
    for (name, one), (other, two) in zip(
        model.hf_model.state_dict().items(), plain.hf_model.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(one, two)


def test_sizes_that_are_no_multiple_of_16_stay_and_are_named() -> None:
    options = tiny_options("qwen2", "bfloat16")
    options.config["intermediate_size"] = 72
    model, _ = build_model(options, 128)
    said = use_float8(model, "emulated", CPU, compiled=False)
    assert said.startswith("float8, emulated: 8 linear layers of the decoder; left as they are")
    assert "model.layers.1.mlp.down_proj (72 x 48)" in said and "q_proj" not in said
    assert type(layers_of(model)[0].mlp.gate_proj) is nn.Linear


# Gradients in e5m2 have a bit less: a product of one with an operand in e4m3 is 1.6 times as far off.
@pytest.mark.parametrize(
    ("float8", "other", "bound"),
    [("emulated", "off", ROUNDING), ("emulated_tensorwise", "emulated", 1.6 * ROUNDING)],
)
def test_one_step_is_near_that_of_bf16(float8: str, other: str, bound: float) -> None:
    loss, found = gradients(made(float8=float8), tiny_batch())
    assert loss != gradients(made(float8=other), tiny_batch())[0]
    plain, truth = gradients(made(float8="off"), tiny_batch())
    assert loss == pytest.approx(plain, rel=5e-3) and loss != plain
    errors = {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth}
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert max(errors.values()) < bound
    # Some rounding there must be, in the gradient of weights too.
    assert errors["model.layers.1.mlp.down_proj.weight"] > 0.01


@pytest.mark.parametrize(
    ("recompute", "float8"),
    [("full", "emulated"), ("keep_attention", "emulated"), ("keep_attention", "emulated_tensorwise")],
)
def test_recompute_repeats_the_same_roundings(recompute: str, float8: str) -> None:
    kept, again = (
        gradients(made(recompute=which, float8=float8), tiny_batch()) for which in ("none", recompute)
    )
    assert kept[0] == again[0]
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


@pytest.mark.parametrize(
    ("float8", "topology", "bound"),
    [
        ("emulated", "dp2", 0.02),
        pytest.param("emulated", "cp2", 0.03, marks=pytest.mark.slow),
        ("emulated_tensorwise", "cp2", 0.3),
    ],
)
def test_two_processes_equal_one(pool: ProcessPool, float8: str, topology: str, bound: float) -> None:
    """A replica takes a sequence of its own, where one process takes both at once: so scales along tokens differ. One
    scale for an operand differs for all of it."""
    one = pool.run(step, world=1, topology="cp1", float8=float8)[0]
    two = pool.run(step, world=2, topology=topology, float8=float8)[0]
    assert two[0] == pytest.approx(one[0], rel=1e-3)
    assert max(relative_errors(two[1], one[1]).values()) < bound


@pytest.mark.slow
@pytest.mark.filterwarnings(*COMPILE)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.sweep)])
def test_layers_compiled_one_by_one_equal_eager_ones(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = made(), made()
    compile_linear(compiled.hf_model, backend)
    truth, found = gradients(eager, tiny_batch()), gradients(compiled, tiny_batch())
    assert found[0] == pytest.approx(truth[0], rel=2e-3)
    assert max(relative_errors(found[1], truth[1]).values()) < 0.05
    # A graph for each of five pairs of sizes, with or without bias, in both layers; as many for all lengths evaluated.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for tokens in (128, 64):
            compiled.token_losses(*(part[:, :tokens] for part in vars(tiny_batch()).values()))
    assert graphs == 5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * graphs


@pytest.mark.slow
@pytest.mark.filterwarnings(*COMPILE)
def test_whole_layers_compile_with_float8_inside() -> None:
    """As one graph without a break. inductor rounds less on the way, so float8 would round otherwise."""
    torch._dynamo.reset()
    truth = gradients(made(), tiny_batch())
    with mock.patch.object(parallel, "fuse", functools.partial(fuse, backend="aot_eager")):
        found = gradients(made(fused="compile", recompute="full"), tiny_batch())
    assert found[0] == pytest.approx(truth[0], rel=1e-4)
    assert max(relative_errors(found[1], truth[1]).values()) < 0.01


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(match: str, **options: Any) -> None:
    settings: dict[str, Any] = {"how": "rowwise", "device_type": "cuda", "compute": BF16, "adapter": False}
    with pytest.raises(UserError, match=match):
        check_float8(**{**settings, **options})


def test_what_cannot_be_computed_is_refused_in_one_sentence() -> None:
    refused(r"train.float8='fp8' is not known; choose one of off, rowwise, tensorwise, emulated", how="fp8")
    refused(r"train.float8=rowwise needs an NVIDIA GPU, not cpu; use train.float8=off", device_type="cpu")
    refused(r"train.float8=emulated_tensorwise, which is slow", how="tensorwise", device_type="cpu")
    refused(r"set train.dtype=bf16, or train.float8=off", compute=torch.float32)
    refused(r"does not go with model.lora", adapter=True)
    with pytest.raises(UserError, match="needs an NVIDIA GPU, not cpu"):
        made(float8="rowwise")


def test_an_older_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        if fits:
            check_gpu("rowwise", torch.device("cuda", 0))
            continue
        with pytest.raises(
            UserError, match=r"capability 8.9 or newer, and NVIDIA A100 has 8.0; use train.float8=off"
        ):
            check_gpu("rowwise", torch.device("cuda", 0))
        check_gpu("emulated", torch.device("cuda", 0))


def test_a_missing_or_old_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    refused(r"needs the package torchao; run: pip install 'torchao>=0.18', or use train.float8=off")
    # What is predicted for GPUs elsewhere needs no package here.
    check_float8("rowwise", "meta", BF16, adapter=False)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.1")
    refused(r"needs torchao 0.18 or newer, and 0.17.1 is installed")


def test_experts_and_models_without_a_layer_to_convert_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"the experts of mixtral are not linear layers that torchao converts"
    ):
        use_float8(tiny_model("mixtral", "bfloat16"), "emulated", CPU, compiled=False)
    options = tiny_options("llama", "bfloat16")
    options.config.update(
        hidden_size=72, intermediate_size=72, num_attention_heads=1, num_key_value_heads=1, head_dim=24
    )
    with pytest.raises(UserError, match=r"no linear layer of llama has both sizes a multiple of 16"):
        use_float8(build_model(options, 128)[0], "emulated", CPU, compiled=False)


def test_what_torchao_tells_of_parts_for_gpus_is_silenced_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """transformers loads torchao where it is installed, whether it is used or not."""
    logging.getLogger("torchao").warning("Failed to load a.so: no CUDA here")
    logging.getLogger("torchao").warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_layers_that_keep_single_products_are_refused() -> None:
    policies = [LayerPolicy(frozenset({MLP})), LayerPolicy()]
    with pytest.raises(UserError, match=r"float8=emulated does not go with layers that keep single products"):
        made(recompute=policies)
