"""Reading moments that a checkpoint has in another form than this run's optimizer: in 8 bits, or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mtraining.predict.moments import rows_at_once
from mtraining.train.moments import MOMENTS, code_values, decoded, encoded, local, scale_name, spread

_CPU = torch.device("cpu")
State = dict[str, Any]


class OtherForm:
    """Stands in for the moments of which a checkpoint has another form, while it is read.

    Args:
        optimizer: the optimizer's part of what is read (`torch.distributed.checkpoint.state_dict`), changed here: what
            the checkpoint has in another form is replaced by tensors of that form.
        parameters: by the same names.
        stored: what the checkpoint holds, by key.
    """

    def __init__(
        self, optimizer: Mapping[str, Any], parameters: Mapping[str, Tensor], stored: Mapping[str, Any]
    ) -> None:
        self._states: dict[str, State] = optimizer["state"]
        self._own: dict[str, State] = {}
        for name, state in self._states.items():
            scales = [stored.get(f"optimizer.state.{name}.{scale_name(moment)}") for moment in MOMENTS]
            shapes = [scale.size if isinstance(scale, TensorStorageMetadata) else None for scale in scales]
            if shapes == [
                state[key].shape if (key := scale_name(moment)) in state else None for moment in MOMENTS
            ]:
                continue
            self._own[name] = state
            self._states[name] = _like_stored(parameters[name], state, shapes)

    def convert(self) -> None:
        """Put this run's own moments back, with the values that were read."""
        for name, own in self._own.items():
            read, self._states[name] = self._states[name], own
            for moment, map_ in zip(MOMENTS, code_values(_CPU), strict=True):
                _convert(read, own, moment, map_)


def _like_stored(parameter: Tensor, state: State, shapes: list[torch.Size | None]) -> State:
    """Tensors to read into, in host memory: two forms of everything at once might not fit a device."""
    made: State = {"step": state["step"]}
    for moment, shape in zip(MOMENTS, shapes, strict=True):
        dtype = torch.float32 if shape is None else torch.uint8
        made[moment] = torch.zeros_like(parameter, dtype=dtype, device=_CPU, requires_grad=False)
        if shape is not None:
            rows = local(parameter).shape[0]
            made[scale_name(moment)] = spread(torch.zeros(rows, shape[1]), parameter, shape)
    return made


def _convert(read: State, own: State, moment: str, map_: Tensor) -> None:
    """One moment, some rows at a time."""
    codes, mine = local(read[moment]), local(own[moment])
    scale, my_scale = (state.get(scale_name(moment)) for state in (read, own))
    rows = rows_at_once(codes.shape)
    for start in range(0, codes.shape[0] if codes.ndim else 1, rows):
        here = slice(start, start + rows) if codes.ndim else ...
        values = codes[here]
        if scale is not None:
            values = decoded(values, local(scale)[here].cpu(), map_)
        if my_scale is None:
            mine[here].copy_(values)
            continue
        target = local(my_scale)[here]
        found, size = encoded(values, values.numel() // target.numel(), map_)
        mine[here].copy_(found)
        target.copy_(size.view(target.shape))
