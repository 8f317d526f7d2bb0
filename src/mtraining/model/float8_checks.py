"""Who may ask for products in float8 (model/float8.py). A launcher asks here, and imports no models for it."""

from __future__ import annotations

import importlib.metadata
from typing import Literal, cast, get_args

import torch

from mtraining.errors import UserError

Float8 = Literal["off", "rowwise", "tensorwise", "emulated", "emulated_tensorwise"]
FLOAT8: tuple[str, ...] = get_args(Float8)
EMULATIONS: dict[str, Float8] = {"rowwise": "emulated", "tensorwise": "emulated_tensorwise"}
"""The same roundings computed in fp32, by the form that computes in float8."""
_LEAST_VERSION = (0, 18)
_LEAST_CAPABILITY = (8, 9)


def emulation_of(how: str) -> Float8:
    """The form that rounds as ``how`` does and computes in fp32; ``off`` and emulations are their own."""
    return EMULATIONS.get(how, cast(Float8, how))


def recipe_of(how: str) -> str:
    """torchao's name for the scales of a form, the same for an emulation as for what it emulates."""
    return next((form for form, emulation in EMULATIONS.items() if emulation == how), how)


def require_torchao(option: str, otherwise: str) -> None:
    """Refuse an option where torchao is missing or too old.

    Args:
        option: with its value, such as ``train.float8=rowwise``.
        otherwise: what to set instead.

    Raises:
        UserError: naming the option.
    """
    wanted = ".".join(map(str, _LEAST_VERSION))
    remedy = f"run: pip install 'torchao>={wanted}', or use {otherwise}."
    try:
        found = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{option} needs the package torchao; {remedy}") from None
    if tuple(int(part) for part in found.split(".")[:2]) < _LEAST_VERSION:
        raise UserError(f"{option} needs torchao {wanted} or newer, and {found} is installed; {remedy}")


def check_float8(how: str, device_type: str, compute: torch.dtype, adapter: bool) -> None:
    """Refuse what can be refused before there are weights and before a GPU is touched.

    Args:
        device_type: ``meta`` stands for a GPU that is elsewhere.
        compute: dtype that layers compute in.
        adapter: whether a low-rank adapter is trained.

    Raises:
        UserError: naming the option and the remedy.
    """
    if how not in FLOAT8:
        raise UserError(f"train.float8={how!r} is not known; choose one of {', '.join(FLOAT8)}.")
    if how == "off":
        return
    if adapter:
        raise UserError(
            f"train.float8={how} does not go with model.lora: torchao's backward would also compute the gradients of "
            "frozen weights; use train.float8=off."
        )
    if device_type != "meta":
        require_torchao(f"train.float8={how}", "train.float8=off")
    if how in EMULATIONS and device_type == "cpu":
        raise UserError(
            f"train.float8={how} needs an NVIDIA GPU, not cpu; use train.float8=off, or "
            f"train.float8={EMULATIONS[how]}, which is slow and computes the same numbers."
        )
    if how in EMULATIONS and compute != torch.bfloat16:
        raise UserError(
            f"train.float8={how} has results in bf16, and layers compute in {compute}; set train.dtype=bf16, or "
            "train.float8=off."
        )


def check_gpu(how: str, device: torch.device) -> None:
    """Refuse a GPU without float8 products. It starts CUDA, so the allocator must be set before.

    Raises:
        UserError: naming the GPU.
    """
    if how not in EMULATIONS or device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < _LEAST_CAPABILITY:
        raise UserError(
            f"train.float8={how} needs a GPU of compute capability 8.9 or newer, and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; use train.float8=off."
        )
