"""Transfers between ranks, and a benchmark's way of making those between nodes slow."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist

from mtraining.errors import UserError

_HEAD_START_CYCLES = 20_000


class Waitable(Protocol):
    """What is left of :class:`torch.distributed.Work` here."""

    def wait(self) -> object: ...


def begin_transfer(send: dist.P2POp | None, receive: dist.P2POp | None) -> Sequence[Waitable]:
    """Begin both at once, in the background; the transfer is done when all that is returned has been waited for.

    One of them may be None: nothing to send, or nothing to receive.
    """
    operations = [operation for operation in (send, receive) if operation is not None]
    if _slow and any(map(_slow[-1].between, operations)):
        return _slow[-1].begin(send, operations)
    return dist.batch_isend_irecv(operations)


def begin_sum(x: torch.Tensor, group: dist.ProcessGroup) -> Sequence[Waitable]:
    """Begin summing ``x`` in place over a group, in the background; done like a transfer."""
    if _slow and _slow[-1].nodes(group) > 1:
        return _slow[-1].begin_sum(x, group)
    return [_sum(x, group)]


def _sum(x: torch.Tensor, group: dist.ProcessGroup) -> Waitable:
    work = dist.all_reduce(x, group=group, async_op=True)
    assert work is not None
    return work


def prioritise_transfers() -> None:
    """Ask NCCL for streams of high priority; call it before any process group is made.

    A transfer that becomes ready beside a kernel of thousands of blocks is then not behind all of them.
    """
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")


def head_start(device: torch.device) -> None:
    """Let a transfer just begun take its place on the GPU ahead of the next kernel, for ten microseconds.

    Some kernels fill every multiprocessor until they end; begun first, one would keep out a transfer that has nothing
    else to hide under.
    """
    if device.type == "cuda":
        torch.cuda._sleep(_HEAD_START_CYCLES)


@contextmanager
def slow_links(
    node_size: int, delay_seconds: float = 0.0, bytes_per_second: float = math.inf
) -> Iterator[None]:
    """Pretend that every ``node_size`` neighbouring global ranks are a node, and that links between nodes are slow.

    For benchmarks on one machine; enter it on all ranks alike. Each rank has one link to other nodes, as with one
    network card a GPU, which carries one message at a time: delay_seconds + bytes / bytes_per_second each. Slowed are
    the ring's hops (keys, values and their gradients) and its sums of columns, which over n nodes put
    2 (n - 1) / (n node_size) of their bytes on each link; the collectives of estimation are not.

    On a GPU the sender's link is a stream that spins for that long before the message is handed to NCCL. Neither the
    host nor computing is held up, except where it waits for the message. Elsewhere messages go at once, and both ends
    see theirs arrive that much after they asked for it.

    Raises:
        UserError: no nodes of such a size, a delay that is negative or without end, or no bandwidth.
    """
    if node_size < 1 or not 0 <= delay_seconds < math.inf or not bytes_per_second > 0:
        raise UserError(
            f"slow_links: node_size={node_size}, delay_seconds={delay_seconds}, bytes_per_second={bytes_per_second} is "
            "no network; use a node_size of at least 1, a delay of at least 0 and a bandwidth above 0."
        )
    links = _SlowLinks(node_size, delay_seconds, bytes_per_second)
    _slow.append(links)
    try:
        yield
    finally:
        _slow.remove(links)


@dataclass(eq=False)
class _SlowLinks:
    node_size: int
    delay_seconds: float
    bytes_per_second: float
    free_at: float = 0.0  # when this rank's link has carried all it was given, on CPUs
    streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)

    def between(self, operation: dist.P2POp) -> bool:
        """Whether it crosses nodes."""
        return operation.peer // self.node_size != dist.get_rank() // self.node_size

    def begin(self, send: dist.P2POp | None, operations: Sequence[dist.P2POp]) -> Sequence[Waitable]:
        """Begin the operations, ``send`` being one of them or None."""
        tensor = operations[0].tensor
        # On the CPU what only arrives is late by as much as its like.
        carried = tensor.nbytes if not tensor.is_cuda or (send is not None and self.between(send)) else None
        return self._carry(tensor.device, carried, lambda: dist.batch_isend_irecv(list(operations)))

    def begin_sum(self, x: torch.Tensor, group: dist.ProcessGroup) -> Sequence[Waitable]:
        nodes = self.nodes(group)
        carried = 2 * (nodes - 1) / (nodes * self.node_size) * x.nbytes
        return self._carry(x.device, carried, lambda: [_sum(x, group)])

    def nodes(self, group: dist.ProcessGroup) -> int:
        """That its ranks are on."""
        return len({rank // self.node_size for rank in dist.get_process_group_ranks(group)})

    def _carry(
        self, device: torch.device, carried: float | None, begin: Callable[[], Sequence[Waitable]]
    ) -> Sequence[Waitable]:
        """Begin a message that puts this many bytes on this rank's link; None for one that only arrives here."""
        seconds = 0.0 if carried is None else self.delay_seconds + carried / self.bytes_per_second
        if device.type != "cuda":
            self.free_at = max(self.free_at, time.perf_counter()) + seconds
            return [*begin(), _Arrival(self.free_at)]
        # NCCL's stream waits for the one that is current when it is called: here, for the spinning link.
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device, priority=-1)
        link = self.streams[device]
        link.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(link):
            if seconds:
                torch.cuda._sleep(round(seconds * _cycles_per_second(device)))
            return begin()


@dataclass(frozen=True)
class _Arrival:
    """A moment, by time.perf_counter."""

    at: float

    def wait(self) -> None:
        time.sleep(max(0.0, self.at - time.perf_counter()))


@cache
def _cycles_per_second(device: torch.device) -> float:
    """The clock of torch.cuda._sleep, measured once: the caller's stream and the host wait for it."""
    cycles = 20_000_000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles * 1000 / begin.elapsed_time(end)


_slow: list[_SlowLinks] = []
