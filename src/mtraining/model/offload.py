"""What layer recompute keeps, in pinned host memory between forward and backward.

Each layer keeps its input (and, with `keep_attention`, attention's output and lse). As a layer begins, its input leaves
on a stream of its own while the layer computes; in backward, as a layer begins, what the layer before it kept comes
back while this one computes. The host waits for nothing. torch's own `save_on_cpu` fetches a tensor at the moment it is
needed, with nothing to hide the copy behind, and allocates its host memory anew each time.

All copies are in one stream, in order: a host buffer may be written again as soon as its copy back has been issued.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mtraining.ring import IndexTape
from mtraining.ring.tape import Recorded

_LEAVING = 2  # layers whose copies out may be under way: their tensors are held, and device memory with them


class Lane(Protocol):
    """Copies between device and host beside the caller's work; what `out` and `back` give (last) is for `wait`."""

    def empty(self, tensor: Tensor) -> Tensor: ...
    def out(self, tensor: Tensor, host: Tensor) -> Any: ...
    def back(self, host: Tensor) -> tuple[Tensor, Any]: ...
    def wait(self, copied: Any) -> None: ...


class CudaLane:
    """A stream of copies on one GPU. Waiting is the current stream's, never the host's."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def empty(self, tensor: Tensor) -> Tensor:
        """Pinned host memory for a copy of ``tensor``."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)

    def out(self, tensor: Tensor, host: Tensor) -> torch.cuda.Event:
        """Copy to ``host``, behind what the current stream has been given; hold ``tensor`` until the copy is done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
            return self._stream.record_event()

    def back(self, host: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A copy of ``host`` on the device, in memory of the current stream."""
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # whoever had this memory before
        with torch.cuda.stream(self._stream):
            tensor.copy_(host, non_blocking=True)
            return tensor, self._stream.record_event()

    def wait(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(copied)


@dataclass
class _Entry:
    """One kept tensor: at home (``tensor``), away (``host``), or on its way back (``tensor``, once ``copied``)."""

    tensor: Tensor | None = None
    host: Tensor | None = None
    copied: Any = None


class Kept:
    """What one layer keeps in one forward, until its backward takes it, once."""

    def __init__(self, owner: Offloader, previous: Kept | None, stays: bool) -> None:
        self._owner, self._previous, self._stays = owner, previous, stays
        self._entries: list[_Entry] = []

    def keep(self, tensor: Tensor) -> int:
        """Keep a tensor that nobody changes; the number is what `take` wants."""
        tensor = tensor.detach()
        self._entries.append(_Entry(tensor=tensor) if self._stays else _Entry(host=self._owner.send(tensor)))
        return len(self._entries) - 1

    def take(self, number: int) -> Tensor:
        """The tensor back; on return this layer's others, and the previous layer's, are on their way."""
        self.start()
        if self._previous is not None:
            self._previous.start()
            self._previous = None
        entry = self._entries[number]
        if entry.tensor is None:
            raise RuntimeError("train.offload: backward runs once through a forward; run the forward again")
        if entry.copied is not None:
            self._owner.lane.wait(entry.copied)
        tensor, entry.tensor = entry.tensor, None
        return tensor

    def start(self) -> None:
        """Begin to bring back what is away."""
        for entry in self._entries:
            if entry.host is not None:
                entry.tensor, entry.copied = self._owner.fetch(entry.host)
                entry.host = None

    def hooks(self) -> AbstractContextManager[None]:
        """Around `torch.utils.checkpoint.checkpoint`: it saves the layer's input under these."""

        def pack(tensor: Tensor) -> Tensor | int:
            # torch 2.11 saves an empty one besides.
            activation = tensor.is_floating_point() and tensor.numel() > 0
            return self.keep(tensor) if activation else tensor

        def unpack(packed: Tensor | int) -> Tensor:
            return self.take(packed) if isinstance(packed, int) else packed

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class Offloader:
    """The host memory of one model and the copies to and from it.

    Args:
        lane: the copies; None keeps everything in place (on a CPU there is no other memory).
    """

    def __init__(self, lane: Lane | None) -> None:
        self._lane = lane
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._leaving: deque[list[tuple[Tensor, Any]]] = deque()
        self._newest: Callable[[], Kept | None] = lambda: None

    @property
    def lane(self) -> Lane:
        assert self._lane is not None, "nothing leaves without a lane"
        return self._lane

    def layer(self, index: int, stays: bool) -> Kept:
        """For layer ``index`` as its forward begins; layers come in order. What ``stays`` is kept where it is."""
        kept = Kept(self, self._newest() if index else None, stays or self._lane is None)
        self._newest = weakref.ref(kept)
        while len(self._leaving) >= _LEAVING:
            self._let_go()
        self._leaving.append([])
        return kept

    def send(self, tensor: Tensor) -> Tensor:
        """Begin a copy to the host, of a tensor of the newest layer."""
        free = self._free.setdefault((tensor.shape, tensor.dtype), [])
        host = free.pop() if free else self.lane.empty(tensor)
        self._leaving[-1].append((tensor, self.lane.out(tensor, host)))
        return host

    def fetch(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begin a copy to the device; the host buffer is free for whatever the lane does after it."""
        while self._leaving:
            self._let_go()
        back = self.lane.back(host)
        self._free[host.shape, host.dtype].append(host)
        return back

    def _let_go(self) -> None:
        for _, copied in self._leaving.popleft():
            self.lane.wait(copied)


def make_offloader(device: torch.device) -> Offloader:
    """An offloader for a model on ``device``."""
    return Offloader(CudaLane(device) if device.type == "cuda" else None)


@dataclass
class _Away(Recorded):
    """A recorded call whose outputs a layer keeps, by number."""

    out_number: int = -1
    lse_number: int = -1


class OffloadedTape(IndexTape):
    """An `IndexTape` that keeps the outputs of attention where the layer keeps its input."""

    def __init__(self, kept: Kept) -> None:
        super().__init__(keep_outputs=True)
        self._kept = kept

    def write(self, call: Recorded) -> None:
        assert call.out is not None and call.lse is not None
        numbers = self._kept.keep(call.out), self._kept.keep(call.lse)
        super().write(_Away(call.index, None, None, *numbers))

    def read(self) -> Recorded:
        call = super().read()
        assert isinstance(call, _Away)
        return Recorded(call.index, self._kept.take(call.out_number), self._kept.take(call.lse_number))
