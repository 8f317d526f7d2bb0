"""Products in float8 by themselves: a converted linear layer beside its emulation, on the same random operands.

In a whole model, an activation that is rounded otherwise to bf16 may be rounded otherwise to float8. That has three
bits, and such differences grow from product to product. Nothing precedes the products here, so the operands are equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtraining.bench.attention.gate import GateError
from mtraining.model.float8 import converts, use_float8
from mtraining.model.float8_checks import emulation_of, recipe_of
from mtraining.model.support import layers_of

TOKENS = 256
SMALL = 2.0**-18
# Relative, of each row and of each column of a result. Rounding sums to bf16 moves a row by up to 2.4e-3. Hopper keeps
# about 14 bits while it sums; simulated with 13, that moves a row of 2048 products by 1.4e-3. Operands in bf16 in place
# of float8 move it by 4e-2 and more.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}


def check_products(model: Any, emulation: Any, how: str, device: torch.device) -> None:
    """Compare each kind of linear layer, converted as training converts it, with its emulation (`compare_layers`).

    A kind is a pair of sizes, with or without a bias. Both models are converted in place; on a GPU the tested layers
    are compiled one by one, and the emulated ones stay eager.

    Args:
        model: a transformers model in the dtype to compute in.
        emulation: the same model once more.
        how: float8 of ``model``, as `mtraining.model.float8.use_float8` takes it.

    Raises:
        GateError: naming a layer and its result at fault.
    """
    names = kinds(model)
    use_float8(model, how, device, compiled=False)
    use_float8(emulation, emulation_of(how), device, compiled=True)
    for name in names:
        compare_layers(name, model.get_submodule(name), emulation.get_submodule(name), how)


def kinds(model: Any) -> list[str]:
    """The first layer of every kind among the linear layers that float8 products can take."""
    found: dict[tuple[int, int, bool], str] = {}
    names = {module: name for name, module in model.named_modules()}
    for layer in layers_of(model):
        for module in layer.modules():
            if isinstance(module, nn.Linear) and converts(module):
                found.setdefault(kind(module), names[module])
    return list(found.values())


def kind(layer: nn.Linear) -> tuple[int, int, bool]:
    """(input size, output size, whether there is a bias)."""
    return layer.in_features, layer.out_features, layer.bias is not None


def compare_layers(name: str, tested: nn.Linear, expected: nn.Linear, how: str) -> None:
    """Compare the output and the gradients of input and weight of two layers of the same sizes.

    Each rank draws the same operands. Their rows differ in size, so that a scale of another row shows. Every eighth is
    far smaller than the rest: under one scale for all rows, float8 would hold nothing of it.

    Args:
        name: of the layers, for the error.
        tested: its weight and bias are overwritten.
        expected: likewise; the dtype of its weight is that of all operands.
        how: float8 of both. With ``tensorwise`` no rows are smaller, for nothing would be left of them.

    Raises:
        GateError: naming the result, and its error.
    """
    generator = torch.Generator().manual_seed(0)
    small = 1.0 if recipe_of(how) == "tensorwise" else SMALL

    def drawn(*sizes: int) -> Tensor:
        values = torch.randn(sizes, generator=generator)
        values *= torch.randn(*sizes[:-1], 1, generator=generator).exp()
        values[..., ::8, :] *= small
        return values.to(expected.weight)

    x, upstream = drawn(1, TOKENS, expected.in_features), drawn(1, TOKENS, expected.out_features)
    with torch.no_grad():
        expected.weight.copy_(drawn(*expected.weight.shape))
        if expected.bias is not None:
            # A larger one would hide the products of the small rows.
            expected.bias.copy_(small * drawn(*expected.bias.shape, 1)[:, 0])
        tested.load_state_dict(expected.state_dict())
    found, truth = (_results(layer, x, upstream) for layer in (tested, expected))
    allowed = TOLERANCE[expected.weight.dtype]
    for result, right in truth.items():
        worst = max(_relative(found[result], right, dim) for dim in (0, 1))
        if not worst <= allowed:
            raise GateError(
                f"float8 {result} of {name}: relative error of a row or column {worst:.1e}, at most {allowed:.0e} is "
                "allowed"
            )


def _results(layer: nn.Linear, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Matrices in fp32."""
    x = x.clone().requires_grad_()
    output = layer(x)
    of_input, of_weight = torch.autograd.grad(output, (x, layer.weight), upstream)
    return {
        "output": output[0].detach().float(),
        "gradient of the input": of_input[0].float(),
        "gradient of the weight": of_weight.float(),
    }


def _relative(found: Tensor, truth: Tensor, dim: int) -> float:
    """The largest of the vectors along ``dim``; NaN counts as infinite."""
    if found.shape != truth.shape:
        return float("inf")
    errors = (found - truth).norm(dim=dim) / truth.norm(dim=dim)
    return float(errors.nan_to_num(torch.inf).max())
