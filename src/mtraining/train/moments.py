"""AdamW whose moments take less of a GPU: in 8 bits, or in host memory.

Both are `torch.optim.AdamW` in all but where its moments are: the same options, the same update, and a step that the
device itself holds back (`found_inf`, see `mtraining.train.optim.step_where_finite`). Moments are ordinary tensors,
sharded as their parameters are, so checkpoints hold them as they hold any other.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtraining.errors import UserError
from mtraining.model.float8_checks import require_torchao
from mtraining.predict.moments import SLOTS, block_of, rows_at_once
from mtraining.sizes import size_text

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the two moments in an optimizer's state; in 8 bits each has a scale beside it."""


def scale_name(moment: str) -> str:
    """The name of a moment's scales in an optimizer's state."""
    return f"{moment}_scale"


def local(tensor: Any) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread(part: Tensor, like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of ``shape`` of which ``part`` is this rank's, cut as the parameter ``like`` is: by rows."""
    if not isinstance(like, DTensor):
        return part
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


class _AdamW(torch.optim.AdamW):
    """What both share: the order of a step, and loading."""

    found_inf: Tensor | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, which casts moments to the parameter's dtype and device; here they stay as they are."""
        groups = state_dict["param_groups"]
        super().load_state_dict({"state": {}, "param_groups": groups})
        names = chain.from_iterable(group["params"] for group in groups)
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        for name, parameter in zip(names, parameters, strict=True):
            if name in state_dict["state"]:
                self.state[parameter] = dict(state_dict["state"][name])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `found_inf` is above 0."""
        updates = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in updates:
            if not self.state[parameter]:
                self._begin(parameter)
        if updates:
            self._update_all(updates)

    def _begin(self, parameter: nn.Parameter) -> None:
        """Make the state of a parameter."""
        raise NotImplementedError

    def _update_all(self, updates: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        raise NotImplementedError

    def _held_back(self, device: torch.device) -> Tensor:
        """fp32 0-d: 1 where the step is to change nothing."""
        return torch.zeros((), device=device) if self.found_inf is None else self.found_inf.to(device)


class AdamW8bit(_AdamW):
    """Moments in 8 bits: a code for each number, and an fp32 scale for each block of a row (`block_of`).

    The codes are those of torchao's ``AdamW8bit`` (dynamic exponent, arXiv:2110.02861; see `encoded`), and so is the
    update, in fp32. torchao's own class cuts blocks from a rank's shard, so another number of ranks cannot read what
    it saves. It also makes the host wait to learn whether gradients are finite.

    Args:
        groups: parameter groups. options: of `torch.optim.AdamW`.
        compiled: whether the update is compiled; eager, it is some forty passes over a chunk.
    """

    def __init__(self, groups: Any, compiled: bool, **options: Any) -> None:
        require_torchao("train.optimizer_state=8bit", "train.optimizer_state=offload")
        super().__init__(groups, **options)
        self._compiled = compiled
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._update: Any = None

    def _begin(self, parameter: nn.Parameter) -> None:
        state, part, shape = self.state[parameter], local(parameter), parameter.shape
        block = block_of(shape)
        state["step"] = torch.zeros((), device=part.device)
        for moment in MOMENTS:
            dtype = torch.uint8 if block else torch.float32
            zeros = torch.zeros(part.shape, dtype=dtype, device=part.device)
            state[moment] = spread(zeros, parameter, shape)
            if block is None:
                continue
            blocks = shape.numel() // shape[0] // block
            scale = torch.zeros(part.shape[0], blocks, device=part.device)
            state[scale_name(moment)] = spread(scale, parameter, torch.Size((shape[0], blocks)))

    def _update_all(self, updates: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        if self._update is None:
            self._update = torch.compile(update_8bit) if self._compiled else update_8bit
        device = local(updates[0][0]).device
        held = self._held_back(device)
        # A number of the host would be a constant of the compiled update.
        rates = {group["lr"] for _, group in updates}
        lrs = {lr: torch.full((), float(lr), device=device) for lr in rates}
        maps = self.maps(device)
        # Sizes of blocks, dtypes and options of groups: more kinds than the compiler keeps by default.
        with torch._dynamo.utils.disable_cache_limit():
            for parameter, group in updates:
                state = self.state[parameter]
                state["step"] += 1 - held
                for pieces in _chunks(parameter, state):
                    for piece in pieces:
                        if piece is not None:  # one compilation for any number of blocks
                            torch._dynamo.maybe_mark_dynamic(piece, 0)
                    self._update(
                        *pieces, state["step"], lrs[group["lr"]], held, *group["betas"], group["eps"],
                        group["weight_decay"], maps,
                    )  # fmt: skip

    def maps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The values of the codes of either moment, fp32 (256,)."""
        if device not in self._maps:
            self._maps[device] = code_values(device)
        return self._maps[device]


def code_values(device: torch.device) -> tuple[Tensor, Tensor]:
    """What each code stands for, in the scale of its block: of the first moment, and of the second, which has no
    sign; fp32 (256,)."""
    from torchao.optim.quant_utils import create_dynamic_map

    signed, unsigned = (torch.tensor(create_dynamic_map(signed)) for signed in (True, False))
    return signed.to(device), unsigned.to(device)


def _chunks(parameter: nn.Parameter, state: dict[str, Any]) -> Iterator[list[Any]]:
    """What `update_8bit` takes of some rows at a time, for parameters that are contiguous, as FSDP has them too.

    Parameters of all shapes come as lists of blocks, since each shape would be compiled anew, for some ten seconds.
    """
    names = [name for moment in MOMENTS for name in (moment, scale_name(moment))]
    gradient = local(parameter.grad).contiguous()
    whole = [local(parameter), gradient, *(local(state.get(name)) for name in names)]
    block, part = block_of(parameter.shape), whole[0]
    if part.numel() == 0:
        return
    shape = (-1,) if block is None else (-1, block)
    shapes = (shape, shape, shape, -1, shape, -1)
    for here in _rows(part):
        # `data`: a view's compilation would also be for the shape of what it is a view of.
        yield [
            None if one is None else one[here].view(to).data for one, to in zip(whole, shapes, strict=True)
        ]


def _rows(part: Tensor) -> Iterator[Any]:
    """Indices of the rows of a parameter's part that are updated at one time."""
    if part.ndim == 0:
        yield ...
        return
    rows = rows_at_once(part.shape)
    for start in range(0, part.shape[0], rows):
        yield slice(start, start + rows)


def update_8bit(
    weights: Tensor, gradient: Tensor, first: Tensor, first_scale: Tensor | None, second: Tensor,
    second_scale: Tensor | None, step: Tensor, lr: Tensor, held: Tensor, beta1: float, beta2: float, eps: float,
    decay: float, maps: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """One AdamW update in place, in fp32, of what `_chunks` gives.

    Args:
        weights, gradient: (blocks, numbers of a block), or (numbers,) where there are no scales.
        first, second: moments of that shape, uint8 codes where there are scales, else fp32.
        first_scale, second_scale: fp32 (blocks,), or None.
        step: counted with this one. lr, held: 0-d tensors; ``held`` is above 0 where nothing may change.
        maps: as `code_values` gives them.
    """
    values, slope = weights.float(), gradient.float()
    moments = []
    for codes, scale, map_, new, beta in (
        (first, first_scale, maps[0], slope, beta1),
        (second, second_scale, maps[1], slope.square(), beta2),
    ):
        before = codes if scale is None else decoded(codes, scale, map_)
        moments.append(before.lerp(new, 1 - beta))
    values = values - lr * decay * values
    size = (moments[1].sqrt() / (1 - beta2**step).sqrt()) + eps
    values = values - lr * (moments[0] / (1 - beta1**step)) / size
    free = held == 0
    weights.copy_(torch.where(free, values, weights.float()))
    for moment, codes, scale, map_ in zip(
        moments, (first, second), (first_scale, second_scale), maps, strict=True
    ):
        if scale is None:
            codes.copy_(torch.where(free, moment, codes))
            continue
        found, size = encoded(moment, codes.shape[1], map_)
        codes.copy_(torch.where(free, found, codes))
        scale.copy_(torch.where(free, size, scale))


def encoded(moment: Tensor, block: int, map_: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of the moment's shape, and fp32 scales, one a block, of a moment in fp32.

    What is above 0 never gets the code of 0 in a map without signs, as it does in torchao. The update divides by the
    root of the second moment. A number of an embedding may have a first moment and no gradient in this step; it would
    be divided by eps alone.
    """
    from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

    scaled, scale = scale_tensor(moment, block)
    codes = quantize_8bit_with_qmap(scaled, map_)
    return torch.where((map_[0] == 0) & (codes == 0) & (moment > 0), 1, codes), scale


def decoded(codes: Tensor, scale: Tensor, map_: Tensor) -> Tensor:
    """The moment, fp32, of codes and scales."""
    from torchao.optim.quant_utils import dequant_with_qmap

    return dequant_with_qmap(codes, map_, scale.flatten())


class OffloadedAdamW(_AdamW):
    """Moments in pinned host memory. In the step they come to the device chunk by chunk, are updated there by the
    kernel that `torch.optim.AdamW` has, and go back; copies in both directions run beside the kernel.

    On a CPU moments are where they are, and the same path copies them.
    """

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, **options)
        self._lanes: _Lanes | None = None

    def state_dict(self) -> dict[str, Any]:
        """As in torch, once the moments have arrived in host memory."""
        if self._lanes is not None:
            self._lanes.finish()
        return super().state_dict()

    def _begin(self, parameter: nn.Parameter) -> None:
        """The moments of all parameters that have none, at once: they share one piece of host memory."""
        del parameter
        parts = {p: local(p) for group in self.param_groups for p in group["params"] if not self.state[p]}
        sizes = {p: part.numel() * part.element_size() for p, part in parts.items()}
        # Where each begins is a multiple of every dtype's size.
        rooms = {p: -(-size // 16) * 16 for p, size in sizes.items()}
        device = next(iter(parts.values())).device
        memory, start = pinned(2 * sum(rooms.values()), device, self).numpy(), 0
        for parameter, part in parts.items():
            state = self.state[parameter]
            state["step"] = torch.zeros((), device=device)
            for moment in MOMENTS:
                # By numpy each has a storage of its own. DTensors of a part of a storage cannot be copied, as saving in
                # the background does.
                piece = torch.from_numpy(memory[start : start + sizes[parameter]])
                start += rooms[parameter]
                host = piece.view(part.dtype).view(part.shape)
                # Not from_local, which would move it to the mesh's device.
                state[moment] = (
                    DTensor(host, parameter._spec, requires_grad=False)
                    if isinstance(parameter, DTensor)
                    else host
                )

    def _update_all(self, updates: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        device = local(updates[0][0]).device
        held = self._held_back(device)
        if self._lanes is None:
            self._lanes = _Lanes(device)
        self._lanes.begin()
        for parameter, group in updates:
            state = self.state[parameter]
            state["step"] += 1
            part, gradient = local(parameter), local(parameter.grad)
            hosts = [local(state[moment]) for moment in MOMENTS]
            for here in _rows(part):
                away = [host[here] for host in hosts]
                first, second = self._lanes.fetch(away)
                torch._fused_adamw_(
                    [part[here]], [gradient[here]], [first], [second], [], [state["step"]], amsgrad=False,
                    lr=float(group["lr"]), beta1=group["betas"][0], beta2=group["betas"][1],
                    weight_decay=group["weight_decay"], eps=group["eps"], maximize=False, grad_scale=None,
                    found_inf=held,
                )  # fmt: skip
                self._lanes.send([first, second], away)
            state["step"] -= held
        self._lanes.end()


def pinned(size: int, device: torch.device, owner: object) -> Tensor:
    """Zeros, uint8 (size,), in host memory that a GPU copies without the host's help; pinned while ``owner`` lives.

    torch's own pinned memory comes in powers of two, which could double what is taken.

    Raises:
        UserError: the machine does not have so much.
    """
    try:
        memory = torch.zeros(size, dtype=torch.uint8)
        if device.type == "cuda" and size:
            runtime = torch.cuda.cudart()
            torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
            # `memory` is an argument, so it outlives the registration.
            weakref.finalize(owner, lambda kept: runtime.cudaHostUnregister(kept.data_ptr()), memory)
    except (RuntimeError, MemoryError) as error:
        raise UserError(
            f"train.optimizer_state=offload could not pin {size_text(size)} of host memory for this rank ({error}); "
            "use train.optimizer_state=8bit, or more machines."
        ) from error
    return memory


class _Lanes:
    """Copies of chunks to the device and back, each direction a stream of its own. The host waits for neither."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._in = torch.cuda.Stream(device) if on_gpu else None
        self._out = torch.cuda.Stream(device) if on_gpu else None
        self._leaving: list[tuple[list[Tensor], Any]] = []

    def begin(self) -> None:
        """Before the first chunk of a step: what the last step sent has arrived before it is fetched again."""
        if self._in is not None and self._out is not None:
            self._in.wait_stream(self._out)

    def fetch(self, away: list[Tensor]) -> list[Tensor]:
        """Copies on the device; the current stream waits for them."""
        here = [torch.empty_like(host, device=self._device) for host in away]
        if self._in is None:
            return [one.copy_(host) for one, host in zip(here, away, strict=True)]
        # Their memory may be that of chunks that have left, which the current stream has waited for.
        self._in.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._in):
            for one, host in zip(here, away, strict=True):
                one.copy_(host, non_blocking=True)
        torch.cuda.current_stream(self._device).wait_stream(self._in)
        return here

    def send(self, here: list[Tensor], away: list[Tensor]) -> None:
        """Copy back, behind the current stream's work."""
        if self._out is None:
            for one, host in zip(here, away, strict=True):
                host.copy_(one)
            return
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            for one, host in zip(here, away, strict=True):
                host.copy_(one, non_blocking=True)
            self._leaving.append((here, self._out.record_event()))
        while len(self._leaving) >= SLOTS:
            self._let_go()

    def end(self) -> None:
        """After the last chunk of a step: device memory of chunks is free for what the current stream does next."""
        while self._leaving:
            self._let_go()

    def finish(self) -> None:
        """Wait, the host too, for all copies."""
        if self._out is not None:
            self._out.synchronize()

    def _let_go(self) -> None:
        _, sent = self._leaving.pop(0)
        torch.cuda.current_stream(self._device).wait_event(sent)
