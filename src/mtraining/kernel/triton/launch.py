"""How kernels are launched: with options that releases of Triton would otherwise choose differently."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

ALWAYS = {"enable_fp_fusion": True}
"""Multiply and add in one instruction, as kernels were tested and timed. Triton 3.9 warns where this is left open, and
3.10 would turn it off."""


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """``kernel[grid]``, to be called with the kernel's arguments and further options."""
    return partial(kernel[grid], **ALWAYS)
