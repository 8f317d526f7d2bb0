"""Which positions the tokens of a rank must have; others never pass in silence.

Attention masks by the positions that the layout deals, whatever position ids the model rotates by. Where the two differ
(tokens of another rank or layout, documents that each begin at 0) queries would read keys that they must not see.
Packed documents do begin at 0 each: attention is told their starts, and position ids must be the distances from those.

Positions on a CPU are compared before the model runs. Elsewhere a look at them would wait for the device in every step.
There the comparison stays on the device, and what the decoder returns becomes NaN: the loss and every gradient, too.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mtraining.errors import UserError
from mtraining.kernel.starts import NO_STARTS, no_starts
from mtraining.layout import Layout
from mtraining.model.loss import on_host
from mtraining.ring import BatchStarts, Ring

_numbers = itertools.count()
_bound: WeakValueDictionary[int, PositionCheck] = WeakValueDictionary()


class PositionCheck:
    """Compares the position ids of a decoder's forward with those that ``layout`` deals to this rank of ``cp_mesh``,
    counted from the ``starts`` of the batch, if any."""

    def __init__(self, layout: Layout, cp_mesh: DeviceMesh | None, starts: BatchStarts | None = None) -> None:
        self.layout, self.cp_mesh = layout, cp_mesh
        self.starts = BatchStarts() if starts is None else starts
        self._expected: dict[tuple[int, torch.device], Tensor] = {}
        self._on = True
        self._number = next(_numbers)
        _bound[self._number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has a number of its own."""
        return type(self), (self.layout, self.cp_mesh, self.starts)

    def attach(self, decoder: nn.Module) -> None:
        """Check every forward of ``decoder``, whoever calls it."""
        names = tuple(inspect.signature(decoder.forward).parameters)

        def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            return dict(zip(names, args, strict=False)) | kwargs

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._on:
                self._before(arguments(args, kwargs))

        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return self._after(arguments(args, kwargs), output) if self._on else output

        decoder.register_forward_pre_hook(before, with_kwargs=True)
        decoder.register_forward_hook(after, with_kwargs=True)

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Within, any positions pass: for a caller whose attention is told by other means where its tokens stand."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def wrong(self, position_ids: Tensor) -> Tensor:
        """bool scalar on the ids' device. ``position_ids``: (..., local tokens)."""
        found = (position_ids != self._expected_of(position_ids)).any()
        starts = self.starts.value
        return found if starts is None else found | no_starts(starts)

    def refuse(self, position_ids: Tensor) -> None:
        """Look at the ids, which waits for their device.

        Raises:
            UserError: naming the first that is wrong.
        """
        if not bool(self.wrong(position_ids)):
            return
        starts = self.starts.value
        if starts is not None and bool(no_starts(starts)):
            raise UserError(NO_STARTS)
        expected = self._expected_of(position_ids)
        rows, expected = torch.broadcast_tensors(position_ids.reshape(-1, expected.shape[-1]), expected)
        row, token = (rows != expected).nonzero()[0].tolist()
        ring = Ring.over(self.cp_mesh)
        restarts = (
            "let positions run through the whole sequence, or pass the starts of documents that each begin at 0"
            if starts is None
            else "let them begin at 0 where starts says that a document begins"
        )
        raise UserError(
            f"position_ids are not those that layout {self.layout.name!r} deals to context-parallel rank {ring.rank} "
            f"of {ring.world}: local token {token} has {int(rows[row, token])}, not {int(expected[row, token])}; deal "
            f"batches by the layout given to parallelize and its ring's rank, and {restarts}."
        )

    def _expected_of(self, position_ids: Tensor) -> Tensor:
        """int64 (local,), or (batch, local) where the batch has starts."""
        dealt = self._dealt(position_ids.shape[-1], position_ids.device)
        starts = self.starts.value
        return dealt if starts is None else dealt - starts[:, dealt]

    def _dealt(self, local: int, device: torch.device) -> Tensor:
        """int64 (local,), made once for each length. `UserError` for a length that the layout cannot deal."""
        key = local, device
        if key not in self._expected:
            ring = Ring.over(self.cp_mesh)
            self._expected[key] = self.layout.positions(local * ring.world, ring.world)[ring.rank].to(device)
        return self._expected[key]

    def _before(self, arguments: dict[str, Any]) -> None:
        """What the host can tell."""
        position_ids = _positions(arguments)
        if position_ids is None:
            world = Ring.over(self.cp_mesh).world
            if world > 1:
                raise UserError(
                    f"position_ids are missing, and without them the model takes the tokens of each of {world} ranks "
                    "for the first of the sequence; pass those that the layout deals."
                )
            return
        tokens = next(
            (arguments[name] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None),
            None,
        )
        if tokens is not None and position_ids.shape[-1] != tokens.shape[1]:
            raise UserError(
                f"position_ids of shape {tuple(position_ids.shape)} do not fit {tokens.shape[1]} tokens; pass one for "
                "each."
            )
        if on_host(position_ids):
            self.refuse(position_ids)

    def _after(self, arguments: dict[str, Any], output: Any) -> Any:
        """The output, with hidden states of NaN where only the device knows that positions are wrong."""
        position_ids = _positions(arguments)
        if position_ids is None or position_ids.device.type == "meta":
            return output
        if torch.compiler.is_compiling():
            factor = _factor_op(position_ids, self._number)
        elif on_host(position_ids):
            return output  # compared before the model ran
        else:
            factor = self.factor(position_ids)
        # Not in place: the last norm may be a custom function (liger-kernel's), whose output autograd guards.
        hidden = output[0] * factor
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output["last_hidden_state"] = hidden
        return output

    def factor(self, position_ids: Tensor) -> Tensor:
        """fp32 scalar on the ids' device: 1 where they are right, else NaN."""
        return torch.where(self.wrong(position_ids), torch.nan, 1.0)


def _positions(arguments: dict[str, Any]) -> Tensor | None:
    found = arguments.get("position_ids")
    return arguments.get("cache_position") if found is None else found


# Opaque to torch.compile, which would otherwise trace how a layout deals.
@torch.library.custom_op("mtraining::position_factor", mutates_args=())
def _factor_op(position_ids: Tensor, number: int) -> Tensor:
    if position_ids.device.type == "cpu":
        _bound[number].refuse(position_ids)
    return _bound[number].factor(position_ids)


@_factor_op.register_fake
def _(position_ids: Tensor, number: int) -> Tensor:
    return position_ids.new_empty((), dtype=torch.float32)
