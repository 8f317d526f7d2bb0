"""A GPU of some size, for `recompute: auto` on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from mtraining.model.recompute import LayerPolicy
from mtraining.predict.memory import Traces, Workload, predict
from mtraining.predict.recompute import Choice, Room, choose_policies


def limited(patch: pytest.MonkeyPatch, module: ModuleType, share: float) -> list[Sequence[LayerPolicy]]:
    """Let ``module`` choose for a GPU between what full recompute needs (share 0) and what keeping everything needs.

    Returns:
        the choices, as they are made.
    """
    chosen: list[Sequence[LayerPolicy]] = []

    def choose(work: Workload, device: torch.device, gather: Any) -> tuple[Choice, str]:
        assert len(gather(device)) >= 1  # every rank takes part
        traces = Traces(work)
        least, most = (
            predict(replace(work, recompute=way, offload=False), traces).peak for way in ("full", "none")
        )
        size = least + share * (most - least)
        choice = choose_policies(work, Room(size, size, size), None, traces)
        chosen.append(choice.policies)
        return choice, choice.render(Room(size, size, size))

    patch.setattr(module, "choose_together", choose)
    return chosen
