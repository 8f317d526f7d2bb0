"""How PyTorch's allocator takes memory from an NVIDIA GPU, and what that costs beside the tensors themselves.

By default the allocator takes segments of fixed size. The tensors of a long step differ in size, so freed segments fit
few later tensors. Two H200s, Qwen2.5-3B's shape, 36 layers, 512K tokens, dense: the step ran out of memory with
113 GiB allocated and 20 GiB taken but unused. With expandable segments, which grow instead, the step ran at 118.4 GiB.
"""

from __future__ import annotations

import os

import torch

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Names of the allocator's options, in the order in which PyTorch 2.11 to 2.13 look for them: the first one counts."""
EXPANDABLE = "expandable_segments:True"
_EXPANDABLE_RESERVE = 0.03
"""Most seen: 40.9 GiB where the tensors take 40.0."""
_EXPANDABLE_SLACK = 0.10
"""Two H100s, 36 layers, 256K tokens: 6.2 GiB were taken beside 68.5 GiB of tensors, which is 9 %, and no step ran
short. With 7 % beside 71.9 GiB, where memory was at its end, each step ran short once. At 128K 2.2 GiB were enough."""
_FIXED_RESERVE = 0.20
"""Seen: 20 GiB beside 113, which is 18 %, when the memory was at its end."""


def allocator_options() -> tuple[str, str] | None:
    """(variable, value) of the environment that the allocator reads; None where neither variable is set."""
    return next(((name, os.environ[name]) for name in VARIABLES if name in os.environ), None)


def segments_expand() -> bool:
    """True where a run's segments grow: as the environment says, or as `use_expandable_segments` is going to say."""
    options = allocator_options()
    return options is None or EXPANDABLE in options[1].replace(" ", "").split(",")


def reserve_share() -> float:
    """The share of a step's tensors that a GPU must have free beside them, since the allocator's memory breaks into
    pieces."""
    return _EXPANDABLE_RESERVE if segments_expand() else _FIXED_RESERVE


def slack_share() -> float:
    """The share of a step's tensors that a GPU should have free beside them. With less, down to `reserve_share`, a step
    fits, but the allocator runs short at times (`shortages`)."""
    return max(_EXPANDABLE_SLACK, reserve_share())


def shortages(device: torch.device) -> int:
    """How often since the process began the allocator found no room, and gave back what it kept to find some.

    Each time the GPU's work is waited for and memory is taken anew, so the rank is late, and the others wait for it in
    the ring. 0 on a CPU.
    """
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0)) if device.type == "cuda" else 0


def use_expandable_segments() -> str:
    """Let the CUDA allocator of this process, and of those that it starts, grow its segments.

    Call it before the first tensor is on a GPU; `mtraining.parallelize` and all commands do. Tensors that are there
    already keep their segments. The user's own PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF stays as it is. Without an
    NVIDIA GPU nothing is set.

    Returns:
        One sentence for a log, about what holds now; empty without an NVIDIA GPU.
    """
    if torch.version.cuda is None or not torch.cuda.is_available():
        return ""
    options = allocator_options()
    if options is None:
        os.environ[VARIABLES[-1]] = EXPANDABLE
        # PyTorch reads the environment once, when CUDA starts. Importing a library may start it: torchao asks for the
        # GPU's kind, and transformers imports torchao wherever it is installed.
        if torch.cuda.is_initialized():
            torch._C._accelerator_setAllocatorSettings(EXPANDABLE)
        return (
            f"GPU memory: set {VARIABLES[-1]}={EXPANDABLE}, so that freed memory does not break into pieces; "
            "a value of your own is kept."
        )
    name, value = options
    if segments_expand():
        return f"GPU memory: {name}={value}, as the environment says."
    return (
        f"GPU memory: {name}={value}, as the environment says; without {EXPANDABLE} up to {_FIXED_RESERVE:.0%} more "
        "than the tensors may be taken."
    )
