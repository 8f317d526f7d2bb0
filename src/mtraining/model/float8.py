"""Products of decoder layers in float8, through torchao's float8 training.

A linear layer has three products: forward, gradient of the input, gradient of the weight. Each takes operands in float8
with a scale for each row, or one for the whole operand, and sums in fp32. Parameters, gradients and what is kept for
backward stay as they are, so FSDP2, recompute, checkpoints and exports see an ordinary linear layer. Embeddings, head,
norms and attention are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn

from mtraining.errors import UserError
from mtraining.model.float8_checks import EMULATIONS, recipe_of
from mtraining.model.fused import compiled_whole
from mtraining.model.support import layers_of

# float8 products need sizes that are multiples of this.
MULTIPLE = 16


def converts(module: nn.Module) -> bool:
    """Whether the sizes of a linear layer are such that float8 products can take it."""
    return (
        type(module) is nn.Linear
        and module.in_features % MULTIPLE == 0
        and module.out_features % MULTIPLE == 0
    )


def use_float8(model: Any, how: str, device: torch.device, compiled: bool) -> str:
    """Put torchao's float8 layers in place of the linear layers of every decoder layer. Names and weights stay.

    Call it before the layers are fused, wrapped for recompute and sharded.

    Args:
        model: a transformers causal language model that `check_supported` accepts.
        how: ``rowwise``, with a scale for each row, or ``tensorwise``, with one for each operand and gradients in
            e5m2. ``emulated`` and ``emulated_tensorwise`` are the same roundings, computed in fp32 on any device.
        device: where the model will run.
        compiled: whether whole layers will be compiled. Otherwise each linear layer is, on a GPU: eager casts to
            float8 would write copies in fp32.

    Returns:
        A sentence for the log: how many layers were converted, and the names of those that were not.

    Raises:
        UserError: a model without linear layers that can be converted, or with experts.
    """
    if any(_has_experts(layer) for layer in layers_of(model)):
        raise UserError(
            f"train.float8: the experts of {model.config.model_type} are not linear layers that torchao converts; use "
            "train.float8=off."
        )
    names = {module: name for name, module in model.named_modules()}
    linear = [one for layer in layers_of(model) for one in layer.modules() if isinstance(one, nn.Linear)]
    left = [f"{names[one]} ({one.in_features} x {one.out_features})" for one in linear if not converts(one)]
    if len(left) == len(linear):
        raise UserError(
            f"train.float8: no linear layer of {model.config.model_type} has both sizes a multiple of {MULTIPLE}; use "
            "train.float8=off."
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    recipe = Float8LinearConfig.from_recipe_name(cast(Any, recipe_of(how)))
    recipe = replace(recipe, emulate=how not in EMULATIONS)
    for layer in layers_of(model):
        convert_to_float8_training(layer, module_filter_fn=lambda one, _: converts(one), config=recipe)
    if device.type == "cuda" and not compiled:
        compile_linear(model)
    rest = f"; left as they are, for a size is no multiple of {MULTIPLE}: {', '.join(left)}" if left else ""
    return f"float8, {how}: {len(linear) - len(left)} linear layers of the decoder{rest}"


def compile_linear(model: Any, backend: str = "inductor") -> None:
    """Compile every float8 layer of the decoder for itself, in place."""
    for module in float8_layers(model).values():
        module.forward = _compiled(module.forward, backend)


def float8_layers(model: Any) -> dict[str, Any]:
    """The layers that `use_float8` put into a transformers model, by name."""
    from torchao.float8.float8_linear import Float8Linear

    return {name: module for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def _compiled(forward: Callable[[Tensor], Tensor], backend: str) -> Callable[[Tensor], Tensor]:
    """Training has one length, and gets code for it. Evaluation and generation have many, and share theirs."""
    options: dict[str, Any] = {"option": "train.float8", "remedy": "train.float8=off", "backend": backend}
    train = compiled_whole(forward, "float8 layers", **options)
    measure = compiled_whole(forward, "float8 layers", dynamic=True, **options)

    @wraps(forward)
    def call(x: Tensor) -> Tensor:
        # A graph for each pair of sizes: more than the compiler keeps by default.
        with torch._dynamo.utils.disable_cache_limit():
            return train(x) if torch.is_grad_enabled() else measure(x)

    return call


def _has_experts(layer: nn.Module) -> bool:
    """Whether weights of several matrices are one parameter; convolutions have such a one too."""
    return any(
        parameter.ndim > 2
        for module in layer.modules()
        if not isinstance(module, nn.Conv1d)
        for parameter in module.parameters(recurse=False)
    )
