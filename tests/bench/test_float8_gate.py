"""The training benchmark's gate for float8: what it lets pass, and that each kind of fault is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_train_bench import SPARSE, break_step
from torch import Tensor, nn

from distributed import ProcessPool, Worker
from mtraining.bench.train import gate as train_gate
from mtraining.bench.train import products
from mtraining.bench.train.gate import GateError
from mtraining.bench.train.model import process_for
from mtraining.model.float8 import use_float8

CPU, BF16 = torch.device("cpu"), torch.bfloat16
FLOAT8 = replace(SPARSE, float8="emulated")
LARGEST = torch.finfo(torch.float8_e4m3fn).max


# -- products ----------------------------------------------------------------------------------------------------------


def rounded_whole(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """``x`` in float8 and back, in fp64, with one scale that is no power of two."""
    scale = torch.finfo(dtype).max / x.float().abs().max()
    return (x.float() * scale).to(dtype).double() / scale.double()


def rounded(x: Tensor, dim: int | tuple[int, int], wrong_scale: bool = False) -> Tensor:
    """``x`` in float8 and back, in fp64, with a power of two as the scale of each vector along ``dim``."""
    scale = (LARGEST / x.float().abs().amax(dim, keepdim=True)).log2().floor().exp2()
    data = (x.float() * scale).to(torch.float8_e4m3fn).double()
    return data / (scale.roll(1) if wrong_scale else scale)


class Products(torch.autograd.Function):
    """The three products of a linear layer in float8, summed in fp64; no code of torchao's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fault: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fault = fault
        along = {"scales of columns": 0, "one scale for all rows": (0, 1)}.get(fault, 1)
        used = weight.T if fault == "a transposed operand" else weight
        out = rounded(x, along, fault == "scales of other rows") @ rounded(used, 1).T
        return (out if fault != "one NaN" else out.index_fill(0, torch.tensor(3), torch.nan)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_input = rounded(upstream[0], 1) @ rounded(weight, 0)
        of_weight = rounded(upstream[0], 0, ctx.fault == "scales of other columns").T @ rounded(x, 0)
        if ctx.fault == "the scale of one row":
            of_weight[5] *= 2
        if ctx.fault == "a gradient in bf16":
            of_input = upstream[0].double() @ weight.double()
        return of_input.to(x.dtype), of_weight.to(x.dtype), None


class Layer(nn.Linear):
    fault = ""
    products: Any = Products
    emulation = "emulated"

    def forward(self, x: Tensor) -> Tensor:
        out = self.products.apply(x[0], self.weight, self.fault)[None]
        return out if self.bias is None or self.fault == "no bias" else out + self.bias


class WholeProducts(torch.autograd.Function):
    """The same with one scale for each operand, and gradients in e5m2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fault: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.fault = fault
        used = rounded(x, 1) if fault == "scales of rows" else rounded_whole(x)
        return (used @ rounded_whole(weight).T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        e4m3 = ctx.fault == "gradients in e4m3"
        grad = rounded_whole(upstream[0], torch.float8_e4m3fn if e4m3 else torch.float8_e5m2)
        of_input, of_weight = grad @ rounded_whole(weight), grad.T @ rounded_whole(x)
        if ctx.fault == "the scale of one row":
            of_weight[5] *= 2
        return of_input.to(x.dtype), of_weight.to(x.dtype), None


class WholeLayer(Layer):
    products = WholeProducts
    emulation = "emulated_tensorwise"


def compare(tested: nn.Linear, dtype: torch.dtype) -> None:
    """Beside the emulation of a layer of this kind in the gate's model."""
    model = train_gate.gate_model(FLOAT8, CPU).to(dtype)
    kind = tested.in_features, tested.out_features, tested.bias is not None
    (name,) = (name for name in products.kinds(model) if products.kind(model.get_submodule(name)) == kind)
    how = tested.emulation if isinstance(tested, Layer) else "emulated"
    use_float8(model, how, CPU, compiled=False)
    products.compare_layers("q_proj", tested.to(dtype), model.get_submodule(name), how)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [(64, 64, True), (64, 256, False), (256, 64, False)], ids=str)
def test_products_summed_in_another_way_pass(dtype: torch.dtype, kind: tuple[int, int, bool]) -> None:
    compare(Layer(*kind), dtype)


def test_products_with_one_scale_for_each_operand_pass() -> None:
    compare(WholeLayer(64, 64), BF16)


@pytest.mark.parametrize(
    ("kind", "fault", "result"),
    [
        (Layer, "scales of other rows", "output"),
        (Layer, "scales of columns", "output"),
        (Layer, "one scale for all rows", "output"),
        (Layer, "a transposed operand", "output"),
        (Layer, "no bias", "output"),
        (Layer, "one NaN", "output"),
        (Layer, "a gradient in bf16", "gradient of the input"),
        (Layer, "scales of other columns", "gradient of the weight"),
        (Layer, "the scale of one row", "gradient of the weight"),
        (WholeLayer, "scales of rows", "output"),
        (WholeLayer, "gradients in e4m3", "gradient of the input"),
        (WholeLayer, "the scale of one row", "gradient of the weight"),
    ],
)
def test_every_fault_of_a_product_is_refused(kind: type[Layer], fault: str, result: str) -> None:
    layer = kind(64, 64)
    layer.fault = fault
    with pytest.raises(GateError, match=f"^float8 {result} of q_proj: relative error"):
        compare(layer, BF16)


def test_a_layer_that_was_not_converted_is_refused() -> None:
    with pytest.raises(GateError, match="float8 output of q_proj: relative error of a row or column"):
        compare(nn.Linear(64, 64), BF16)


def test_a_layer_of_every_kind_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    tested, emulated = (train_gate.gate_model(FLOAT8, CPU).to(BF16) for _ in range(2))
    assert [name.removeprefix("model.layers.0.") for name in products.kinds(tested)] == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"
    ]  # fmt: skip
    products.check_products(tested, emulated, "emulated", CPU)

    def nothing(model: Any, how: str, device: torch.device, compiled: bool) -> str:
        return use_float8(model, how, device, compiled) if compiled else ""

    monkeypatch.setattr(products, "use_float8", nothing)
    tested, emulated = (train_gate.gate_model(FLOAT8, CPU).to(BF16) for _ in range(2))
    with pytest.raises(GateError, match=r"float8 output of model\.layers\.0\.self_attn\.q_proj"):
        products.check_products(tested, emulated, "rowwise", CPU)


# -- a whole step ------------------------------------------------------------------------------------------------------

# The same value, another gradient.
GRADIENTS = {
    "missing": lambda y: y.detach() + 0 * y,
    "doubled": lambda y: 2 * y - y.detach(),
    "turned": lambda y: 2 * y.detach() - y,
}


def gate(worker: Worker, fault: str, dtype: torch.dtype) -> str:
    """Job: what the gate says of a step in float8; empty where it passes."""
    real_parallel, real_products = train_gate.parallel, train_gate.check_products

    def parallel(case: Any, model: Any, *args: Any) -> Any:
        """The fault is in the step with float8 only."""
        if case.float8 != "off" and fault == "unconverted":
            case = replace(case, float8="off")
        made = real_parallel(case, model, *args)
        if case.float8 != "off" and fault in GRADIENTS:
            layer = made.hf_model.model.layers[1].self_attn.v_proj
            plain = layer.forward
            layer.forward = lambda x: GRADIENTS[fault](plain(x))
        return made

    def check_products(*args: Any) -> None:
        if fault == "products on one rank" and worker.rank == 1:
            raise GateError("float8 output of q_proj: wrong")
        real_products(*args)

    with pytest.MonkeyPatch.context() as patch:
        break_step(patch, fault)
        patch.setattr(train_gate, "parallel", parallel)
        patch.setattr(train_gate, "check_products", check_products)
        try:
            train_gate.check_step(FLOAT8, process_for(FLOAT8, CPU, worker.rank, worker.world), dtype=dtype)
        except GateError as wrong:
            return str(wrong)
    return ""


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_a_step_in_float8_passes(pool: ProcessPool, dtype: torch.dtype) -> None:
    """In bf16 its roundings to float8 are not those of the reference, as on a GPU."""
    assert pool.run(gate, 2, fault="", dtype=dtype) == ["", ""]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("ring", "with float8 off, gradient of "),
        ("products on one rank", "float8 output of q_proj: wrong"),
        ("unconverted", "other layers are in float8 than in the reference"),
        *((name, "gradient of ") for name in GRADIENTS),
    ],
)
def test_every_fault_of_a_step_is_refused(pool: ProcessPool, fault: str, sentence: str) -> None:
    told = pool.run(gate, 2, fault=fault, dtype=BF16)
    assert told[0] == told[1] and told[0].startswith(sentence), told
