"""A ring pass, simulated: how long ranks compute, and how long they wait for messages that computing did not hide.

The order of work is not written down a second time. The ring's own forward and backward (`mtraining.ring.attention`)
run once with stand-ins for ring, kernels and index that note each call. Every rank does the same in the same order,
with neighbours of its own. So the simulation goes through that one list, with a clock for every rank.

A message starts when both ends have asked for it and the links of both are free. Each rank has one link inside its node
and one to other nodes, each of them carries one message at a time in each direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from mtraining.predict.measured import Link
from mtraining.ring.attention import PreparedCall, ring_backward, ring_forward
from mtraining.ring.topology import ring_offset

Payload = Literal["keys", "gradients", "columns", "column gradients"]
# A stand-in for a payload is a tensor of as many numbers as say which payload it is.
_PAYLOADS: dict[int, Payload] = {2: "keys", 3: "gradients", 4: "columns", 5: "column gradients"}
_LENGTHS = {name: length for length, name in _PAYLOADS.items()}


class Compute(NamedTuple):
    """A call of a kernel. ``offset``: every rank has the keys of rank - offset. ``first`` and ``final``: of the pass.
    ``columns``: it attends to the columns too."""

    kernel: str
    offset: int
    first: bool = False
    final: bool = False
    columns: bool = False


class Send(NamedTuple):
    """A message begun, from every rank to rank + shift."""

    message: int
    payload: Payload
    shift: int


class Sum(NamedTuple):
    """A sum over all ranks begun."""

    message: int
    payload: Payload


class Wait(NamedTuple):
    """For a message, both ways, or for a sum."""

    message: int


Operation = Compute | Send | Sum | Wait


@lru_cache(maxsize=32)
def ring_program(outer: int, inner: int, phase: str, columns: bool) -> tuple[Operation, ...]:
    """What each rank of an ``outer`` x ``inner`` ring does in a pass over it, in order.

    Args:
        phase: forward or backward.
        columns: whether the index has columns.
    """
    recorder = _Recorder(outer, inner, columns)
    k = torch.zeros(1)
    if phase == "forward":
        ring_forward(k, k, k, recorder.call)
    else:
        ring_backward(k, k, k, k, k, k, recorder.call)
    return tuple(recorder.operations)


class _Recorder:
    """Stands for the ring, the kernels and the plan of rank 0, and notes what is asked of them."""

    def __init__(self, outer: int, inner: int, columns: bool) -> None:
        self.outer, self.inner, self.world, self.rank = outer, inner, outer * inner, 0
        self.operations: list[Operation] = []
        self._messages = 0
        plan = SimpleNamespace(ring=self, placements=range(self.world), q_blocks=None, slots=None)
        index = SimpleNamespace(columns=torch.zeros(1 if columns else 0))
        self.call = PreparedCall(cast(Any, plan), cast(Any, self), cast(Any, index), 1.0)

    # Of the ring (mtraining.ring.topology.Ring).
    def source(self, outer_step: int, inner_step: int) -> int:
        return -ring_offset(outer_step, inner_step, self.outer) % self.world

    def inner_hop(self, payload: Tensor) -> _Awaited:
        return self._send(payload, self.outer)

    def outer_hop(self, payload: Tensor) -> _Awaited:
        return self._send(payload, 1)

    def home_hop(self, payload: Tensor, outer_step: int) -> _Awaited:
        away = 0 if outer_step == 0 else ring_offset(outer_step, self.inner - 1, self.outer)
        return self._send(payload, -away if away else self.outer)

    def start_sum(self, x: Tensor) -> _Awaited:
        return self._begin(lambda message: Sum(message, _PAYLOADS[len(x)]), (x, x))

    def _send(self, payload: Tensor, shift: int) -> _Awaited:
        return self._begin(lambda message: Send(message, _PAYLOADS[len(payload)], shift), payload)

    def _begin(self, operation: Callable[[int], Operation], result: Any) -> _Awaited:
        self._messages += 1
        self.operations.append(operation(self._messages))
        return _Awaited(self, self._messages, result)

    # Of the kernels (mtraining.kernel.backend.AttentionKernels).
    def tiles_forward(
        self, q: Any, k: Any, v: Any, index: Any, source: int, scale: Any, out: Any, lse: Any, *,
        columns: Any = None, final: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        self._compute("tiles_forward", source, out is None, final, columns is not None)
        return k, k

    def tiles_backward(
        self, dout: Any, q: Any, k: Any, v: Any, lse: Any, delta: Any, index: Any, source: int, scale: Any
    ) -> tuple[Tensor, Any]:
        self._compute("tiles_backward", source)

        def query_gradient(dq: Any, *, columns: Any = None, final: bool = False) -> Tensor:
            self._compute("query_gradient", source, dq is None, final, columns is not None)
            return cast(Tensor, k)

        return torch.zeros(_LENGTHS["gradients"]), query_gradient

    def row_delta(self, out: Tensor, dout: Tensor) -> Tensor:
        self._compute("row_delta", 0)
        return out

    def gather_columns(self, *_: Any) -> Tensor:
        self._compute("gather_columns", 0)
        return torch.zeros(_LENGTHS["columns"])

    def columns_backward(self, *_: Any) -> Tensor:
        self._compute("columns_backward", 0)
        return torch.zeros(_LENGTHS["column gradients"])

    def scatter_columns(self, *_: Any) -> None:
        self._compute("scatter_columns", 0)

    def _compute(self, kernel: str, source: int, *what: bool) -> None:
        self.operations.append(Compute(kernel, -source % self.world, *what))


class _Awaited:
    def __init__(self, recorder: _Recorder, message: int, result: Any) -> None:
        self._recorder, self._message, self._result = recorder, message, result

    def wait(self) -> Any:
        self._recorder.operations.append(Wait(self._message))
        return self._result


@dataclass(frozen=True)
class Network:
    """Who is where, and the links.

    Attributes:
        node_size: GPUs of a node; neighbours in a node are neighbours in the inner ring.
        intra, inter: one GPU's link inside its node, and to other nodes.
    """

    node_size: int
    intra: Link
    inter: Link

    def nodes(self, outer: int, inner: int) -> Tensor:
        """int64 (ranks,): the node of each rank of the ring."""
        rank = torch.arange(outer * inner)
        place = rank % outer * inner + rank // outer
        return place // self.node_size

    def sum_seconds(self, size: float, nodes: int, ranks: int) -> float:
        """An all-reduce of ``size`` bytes on each rank: inside nodes, and of each rank's share between them."""
        inside = min(ranks, self.node_size)
        seconds = 2 * self.intra.seconds(size * (inside - 1) / inside) if inside > 1 else 0.0
        if nodes > 1:
            seconds += self.inter.seconds(2 * (nodes - 1) / (nodes * inside) * size)
        return seconds


class Span(NamedTuple):
    """What one rank does from ``begin`` to ``end`` seconds, or a message on its way.

    ``lane`` is compute, wait, intra or inter.
    """

    lane: str
    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Simulated:
    """A simulated pass.

    Attributes:
        seconds: until the last rank is done.
        ends: float64 (ranks,), when each is.
        exposed: float64 (ranks,), seconds that each waits for messages.
        spans: of one rank.
    """

    seconds: float
    ends: Tensor
    exposed: Tensor
    spans: list[Span]

    @property
    def exposed_fraction(self) -> float:
        """Mean over ranks of the share of time spent waiting, as the ring's timeline measures it."""
        return float((self.exposed / self.ends.clamp(min=1e-30)).mean())


def simulate(
    outer: int,
    inner: int,
    phase: str,
    cost: Callable[[Compute], Tensor],
    sizes: dict[Payload, float],
    network: Network,
    watched: int = 0,
) -> Simulated:
    """One pass over a ring of ``outer`` x ``inner`` ranks, from a common start.

    Args:
        cost: of a kernel call, seconds on each rank: float64 (ranks,).
        sizes: bytes of a message, by payload; without ``columns`` the index has none.
        watched: the rank whose spans are kept.
    """
    world = outer * inner
    ranks = torch.arange(world)
    nodes = network.nodes(outer, inner)
    node_count = int(nodes.max()) + 1
    clock = torch.zeros(world, dtype=torch.float64)
    exposed, zero = clock.clone(), clock.clone()
    free = {(link, way): zero.clone() for link in ("intra", "inter") for way in ("send", "receive")}
    arrivals: dict[int, Tensor] = {}
    spans: list[Span] = []
    for operation in ring_program(outer, inner, phase, "columns" in sizes):
        if isinstance(operation, Compute):
            begin = clock
            clock = clock + cost(operation)
            spans.append(Span("compute", operation.kernel, float(begin[watched]), float(clock[watched])))
        elif isinstance(operation, Send):
            size = sizes[operation.payload]
            to, sender = (ranks + operation.shift) % world, (ranks - operation.shift) % world
            crosses = nodes != nodes[to]
            ready = torch.maximum(clock, clock[to])
            done = zero
            for link, here in (("intra", ~crosses), ("inter", crosses)):
                if not here.any():
                    continue
                sending, receiving = free[link, "send"], free[link, "receive"]
                begin = torch.maximum(ready, torch.maximum(sending, receiving[to]))
                end = begin + (network.intra if link == "intra" else network.inter).seconds(size)
                done = torch.where(here, end, done)
                free[link, "send"] = torch.where(here, end, sending)
                free[link, "receive"] = torch.where(here[sender], end[sender], receiving)
                if here[watched]:
                    spans.append(Span(link, operation.payload, float(begin[watched]), float(end[watched])))
            arrivals[operation.message] = torch.maximum(done, done[sender])
        elif isinstance(operation, Sum):
            link = "inter" if node_count > 1 else "intra"
            sending, receiving = free[link, "send"], free[link, "receive"]
            begin = torch.maximum(clock, torch.maximum(sending, receiving))
            seconds = network.sum_seconds(sizes[operation.payload], node_count, world) if world > 1 else 0.0
            end = torch.full_like(clock, float(begin.max()) + seconds)
            free[link, "send"] = free[link, "receive"] = arrivals[operation.message] = end
            if world > 1:
                spans.append(Span(link, operation.payload, float(begin[watched]), float(end[watched])))
        else:
            arrived = torch.maximum(clock, arrivals.pop(operation.message))
            exposed += arrived - clock
            if arrived[watched] > clock[watched]:
                spans.append(Span("wait", "wait", float(clock[watched]), float(arrived[watched])))
            clock = arrived
    return Simulated(float(clock.max()), clock, exposed, spans)


def by_source(work: Tensor, offset: int) -> Tensor:
    """(ranks, sources) -> (ranks,): each rank's work for the keys of rank - offset."""
    ranks = torch.arange(len(work))
    return work[ranks, (ranks - offset) % len(work)]


def slowed(
    cost: Callable[[Compute], Tensor], stragglers: Sequence[float] | Tensor
) -> Callable[[Compute], Tensor]:
    """The same ranks, each as many times slower as ``stragglers`` says."""
    factors = torch.as_tensor(stragglers, dtype=torch.float64)
    return lambda operation: cost(operation) * factors
