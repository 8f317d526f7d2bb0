"""Linear layers in bf16 and in torchao's forms of float8 training: forward and backward, and where the time goes.

    python benchmarks/float8_layers.py --out CSV                                      (an NVIDIA GPU, Hopper or newer)
    python benchmarks/float8_layers.py --out CSV --device cpu --tokens 64 --shapes 64x96        (the same in emulation)

Each layer is compiled for itself, as `train.float8` does. ``product_ms`` is the time of the three matrix products, by
the profiler's names of kernels; the rest is casts and scales. Before it is timed, a layer's output and both of its
gradients are compared with those of fp32. One that is further off than float8's rounding allows is written without
times, and the script ends with 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import torch
from step_profile import MATMUL
from torch import Tensor, nn

from mtraining.bench.record import appended, provenance
from mtraining.bench.timing import measure

# Qwen2.5-3B's attention and MLP, then layers of 8B and of 70B parameters.
SHAPES = ("2048x2048", "2048x11008", "11008x2048", "4096x14336", "14336x4096", "8192x28672", "28672x8192")
FIELDS = (
    "date commit gpu torch triton tokens in_features out_features form error forward_ms both_ms product_ms rest_ms "
    "against_bf16".split()
)
# Norm of the difference over that of fp32's result. e4m3 has 3 bits after the first: 2^-4 at most, a third of it in the
# mean, for two operands. tensorwise has gradients in e5m2, with a bit less: twice the error of one operand.
ALLOWED = {"bf16": 0.01, "rowwise": 0.06, "rowwise_with_gw_hp": 0.06, "tensorwise": 0.09}
FORMS = tuple(ALLOWED)


def layer_of(weight: Tensor, form: str) -> tuple[Callable[[Tensor], Tensor], nn.Parameter]:
    """A linear layer of this weight, and its parameter. It is compiled on a GPU; float8 is emulated elsewhere."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    held = nn.Sequential(layer)
    gpu = weight.device.type == "cuda"
    if form != "bf16":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        recipe = replace(Float8LinearConfig.from_recipe_name(form), emulate=not gpu)
        convert_to_float8_training(held, config=recipe)
    (own,) = held.parameters()
    torch.compiler.reset()  # all forms and widths share one code, and PyTorch compiles few variants of that
    return torch.compile(held, fullgraph=True) if gpu else held, own


def results(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, weight: nn.Parameter) -> list[Tensor]:
    """The output, and the gradients of input and weight."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error by norm."""
    pairs = zip(found, exact, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


def product_milliseconds(run: Callable[[], object]) -> float:
    """Of one call, the time in kernels of matrix products."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = seen.key_averages()
    products = (event for event in events if any(word in event.key.lower() for word in MATMUL))
    return sum(event.device_time_total for event in products) / 1e3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="CSV to add to, one row a layer and form")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="such as 2048x11008: in x out")
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    device, wrong = torch.device(options.device), 0
    told = provenance(device)
    with appended(options.out, FIELDS) as add:
        for shape in options.shapes:
            inside, outside = map(int, shape.split("x"))
            random = torch.Generator(device).manual_seed(0)
            draw = {"generator": random, "device": device, "dtype": torch.bfloat16}
            x, grad = (torch.randn(options.tokens, width, **draw) for width in (inside, outside))
            weight = torch.randn(outside, inside, **draw) / inside**0.5
            layer, own = layer_of(weight.float(), "bf16")
            exact = results(layer, x.float(), grad.float(), own)
            plain: float | None = None
            for form in options.forms:
                layer, own = layer_of(weight, form)
                whole = partial(results, layer, x, grad, own)
                off = error(whole(), exact)
                head = [*astuple(told), options.tokens, inside, outside, form, f"{off:.3g}"]
                if not off <= ALLOWED[form]:
                    wrong += 1
                    add([*head, "", "", "", "", ""])
                    print(f"{shape} {form}: off by {off:.3g}; not timed", flush=True)
                    continue
                forward = measure(partial(layer, x.detach().requires_grad_()), device).ms
                both = measure(whole, device).ms
                products = product_milliseconds(whole) if device.type == "cuda" else float("nan")
                plain = both if form == "bf16" else plain
                gain = "" if plain is None else f"{plain / both:.3f}"
                add([*head, *(f"{ms:.4g}" for ms in (forward, both, products, both - products)), gain])
                print(
                    f"{shape} {form}: {both:.2f} ms, {products:.2f} of them products; {gain} of bf16's speed; off by "
                    f"{off:.2g}",
                    flush=True,
                )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
