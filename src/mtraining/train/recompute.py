"""`train.recompute: auto` in a run: one choice for all ranks, from the memory of the smallest GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import device_name
from mtraining.predict.measured import Rates, rates_of_device
from mtraining.predict.memory import OUTSIDE, Unpredictable, Workload
from mtraining.predict.recompute import Choice, Room, choose_policies

ON_CPU = "train.recompute=auto: all layers keep everything, since memory is predicted for GPUs alone"

Gather = Callable[[Any], list[Any]]
"""Each process's value, in rank order; collective."""


def gpu_memory(device: torch.device) -> float:
    """Bytes that this process may take of its GPU: all, less a limit that PyTorch was given, and less what other
    programs hold beyond a context's usual size."""
    free, total = torch.cuda.mem_get_info(device)
    limit = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return float(min(limit * total, total - max(0, others - OUTSIDE)))


def known_rates(device: torch.device) -> Rates | None:
    """Rates of the GPU, the user's own first; None where there are none that can be read."""
    if device.type != "cuda":
        return None
    try:
        return rates_of_device(device_name(device))
    except UserError:  # the log of times tells
        return None


def choose_together(work: Workload, device: torch.device, gather: Gather) -> tuple[Choice | None, str]:
    """What every layer keeps, the same on every rank, and a line for the log. Collective.

    Returns:
        the choice, None on a CPU, where everything is kept.

    Raises:
        UserError: nothing fits, or the model's memory cannot be predicted.
    """
    room = Room.of(gpu_memory(device)) if device.type == "cuda" else None
    everywhere = gather((room, known_rates(device)))
    rooms = [room for room, _ in everywhere if room is not None]
    if not rooms:
        return None, ON_CPU
    smallest = min(rooms)
    choice = choose(work, smallest, everywhere[0][1])
    return choice, choice.render(smallest)


def choose(work: Workload, room: Room, rates: Rates | None) -> Choice:
    """As `mtraining.predict.recompute.choose_policies`, with a remedy for models that cannot be predicted."""
    try:
        return choose_policies(work, room, rates)
    except Unpredictable as reason:
        raise UserError(
            f"train.recompute=auto: {reason} Until then set train.recompute to full, keep_attention or none."
        ) from None
