"""The simulated ring against the authors' formula, measured gloo rings, and real rings under a virtual clock."""

import csv
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distributed import ProcessPool, Worker
from mtraining.kernel import ReferenceBackend
from mtraining.layout import build_layout
from mtraining.pattern import ToeplitzRandom
from mtraining.predict.measured import Link
from mtraining.predict.ring import Compute, Network, Send, Sum, Wait, ring_program, simulate, slowed
from mtraining.ring import Ring, sparse_ring_attention

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
FREE = Link.of_rate(torch.inf)
# How many forward steps a call lasts, as benchmarks/link_delay.py makes its kernels last.
LASTS = {"tiles_forward": 1.0, "tiles_backward": 1.0, "query_gradient": 1.0, "columns_backward": 0.5}
ALL = {"keys": 1.0, "gradients": 1.0, "columns": 1.0, "column gradients": 1.0}


def steps_of(seconds: float, world: int) -> Any:
    return lambda operation: torch.full(
        (world,), seconds * LASTS.get(operation.kernel, 0.0), dtype=torch.float64
    )


@pytest.mark.parametrize("outer, inner, milliseconds", [(1, 32, 34.10), (4, 8, 19.53)])
def test_paper_latencies(outer: int, inner: int, milliseconds: float) -> None:
    """Flat 31 x 0.98 + 0.51, nested 32 x 0.51, each + 1.13 for the index + 2.08 of CPU: arXiv 2510.18830."""
    network = Network(8, Link.of_rate(torch.inf, 0.13e-3), Link.of_rate(torch.inf, 0.98e-3))
    ring = simulate(outer, inner, "forward", steps_of(0.51e-3, 32), {"keys": 1.0}, network)
    assert 1000 * ring.seconds + 1.13 + 2.08 == pytest.approx(milliseconds, abs=0.005)


def delays() -> list[dict[str, str]]:
    with open(RESULTS / "link-delay-cpu-2026-11-23.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", delays(), ids=lambda row: f"{row['ring']}-{row['delay_ms']}ms")
def test_measured_gloo_rings(row: dict[str, str]) -> None:
    """Within 5 % of rings of four processes whose messages between nodes were delayed."""
    outer = 1 if row["ring"] == "flat" else int(row["ring"].split("x")[0])
    network = Network(int(row["node_size"]), FREE, Link.of_rate(torch.inf, float(row["delay_ms"]) / 1000))
    world = int(row["ranks"])
    cost = steps_of(float(row["step_ms"]) / 1000, world)
    passes = [simulate(outer, world // outer, phase, cost, ALL, network) for phase in ("forward", "backward")]
    for found, name in zip(passes, ("forward_ms", "backward_ms"), strict=True):
        assert 1000 * found.seconds == pytest.approx(float(row[name]), rel=0.05)
    exposed = sum(found.exposed for found in passes) / sum(found.ends for found in passes)
    assert float(exposed.mean()) == pytest.approx(float(row["exposed_fraction"]), abs=0.02)


STEP, INSIDE = 1.0, 0.1
# How many times slower each rank is: no two alike, so that each message's partner matters.
FACTORS = (1.0, 1.9, 1.3, 0.6, 2.2, 0.8, 1.1, 1.6)
# (ranks, outer ring, ranks of a node)
RINGS = {4: [(1, 2), (2, 2)], 8: [(1, 4), (2, 4), (4, 2)]}


class VirtualClock:
    """Seconds of one rank that pass only where a kernel works or a message is waited for; the machine's play no part.

    Beside each message of the ring travel its sender's and its receiver's clocks, and when the links of both are free.
    """

    def __init__(self, node_size: int, between: float, factor: float) -> None:
        self.node_size, self.factor = node_size, factor
        self.links = {"intra": INSIDE, "inter": between}
        self.restart()

    def restart(self) -> None:
        self.now = self.waited = 0.0
        self.free = {(link, way): 0.0 for link in self.links for way in ("send", "receive")}

    def begin_transfer(self, send: dist.P2POp, receive: dist.P2POp) -> list[Any]:
        works = dist.batch_isend_irecv([send, receive])
        here = torch.tensor([self.now, *self.free.values()], dtype=torch.float64)
        there = {peer: torch.zeros_like(here) for peer in (send.peer, receive.peer)}
        jobs = [dist.isend(here, peer, tag=7) for peer in there]
        jobs += [dist.irecv(clock, peer, tag=7) for peer, clock in there.items()]
        for job in jobs:
            job.wait()
        ends = {}
        for peer, way, other in ((send.peer, "send", "receive"), (receive.peer, "receive", "send")):
            link = "intra" if peer // self.node_size == dist.get_rank() // self.node_size else "inter"
            now, *free = there[peer].tolist()
            theirs = dict(zip(self.free, free, strict=True))
            ends[link, way] = max(self.now, now, self.free[link, way], theirs[link, other]) + self.links[link]
        self.free |= ends
        return [*works, Arrival(self, max(ends.values()))]

    def begin_sum(self, x: torch.Tensor, group: dist.ProcessGroup) -> list[Any]:
        dist.all_reduce(x, group=group)
        begin = max(self.now, self.free["inter", "send"], self.free["inter", "receive"])
        latest = torch.tensor(begin, dtype=torch.float64)
        dist.all_reduce(latest, dist.ReduceOp.MAX)
        end = float(latest) + 2 * INSIDE + self.links["inter"]
        self.free["inter", "send"] = self.free["inter", "receive"] = end
        return [Arrival(self, end)]

    def lasting(self, name: str, kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.now += STEP * LASTS[name] * self.factor
            result = kernel(*args, **kwargs)
            if name == "tiles_backward":
                return result[0], self.lasting("query_gradient", result[1])
            return result

        return call


class Arrival:
    def __init__(self, clock: VirtualClock, at: float) -> None:
        self.clock, self.at = clock, at

    def wait(self) -> None:
        self.clock.waited += max(0.0, self.at - self.clock.now)
        self.clock.now = max(self.clock.now, self.at)


def ring_under_a_virtual_clock(
    worker: Worker, outer: int, node_size: int, between: float
) -> tuple[int, tuple[float, float], tuple[float, float]]:
    """The ring rank of this process; its clock, and how long it waited, after a real forward and after a backward."""
    inner = worker.world // outer
    mesh = worker.mesh((outer, inner), ("cp_outer", "cp_inner")) if outer > 1 else worker.mesh()
    rank = Ring.over(mesh).rank
    clock = VirtualClock(node_size, between, FACTORS[rank])
    pattern = ToeplitzRandom(block_size=4, density=0.5, window=2, columns=4)
    q, k, v = (torch.randn(1, 16, heads, 4, requires_grad=True) for heads in (2, 1, 1))
    with ExitStack() as patches:
        for name in ("begin_transfer", "begin_sum"):
            patches.enter_context(mock.patch(f"mtraining.ring.topology.{name}", getattr(clock, name)))
        for name in ("tiles_forward", "tiles_backward", "columns_backward"):
            kernel = clock.lasting(name, getattr(ReferenceBackend(), name))
            patches.enter_context(mock.patch.object(ReferenceBackend, name, staticmethod(kernel)))
        out = sparse_ring_attention(
            q, k, v, pattern=pattern, layout=build_layout("striped", 4), mesh=mesh, kernel="reference"
        )
        forward = (clock.now, clock.waited)
        clock.restart()
        out.sum().backward()
    return rank, forward, (clock.now, clock.waited)


@pytest.mark.parametrize("world", [4, 8])
@pytest.mark.parametrize("between", [0.2, 1.5, 9.0])
def test_every_rank_of_real_rings(pool: ProcessPool, world: int, between: float) -> None:
    """Real gloo rings, each of another speed, wait and end on every rank exactly as the simulation says."""
    for outer, node_size in RINGS[world]:
        told = pool.run(
            ring_under_a_virtual_clock, world=world, outer=outer, node_size=node_size, between=between
        )
        network = Network(node_size, Link.of_rate(torch.inf, INSIDE), Link.of_rate(torch.inf, between))
        cost = slowed(steps_of(STEP, world), FACTORS[:world])
        for phase, place in (("forward", 1), ("backward", 2)):
            found = simulate(outer, world // outer, phase, cost, ALL, network)
            real = {result[0]: result[place] for result in told}
            for measured, told_of in enumerate((found.ends, found.exposed)):
                expected = pytest.approx(told_of.tolist(), rel=1e-9, abs=1e-9)
                assert [real[rank][measured] for rank in range(world)] == expected


def test_a_nested_ring_hides_what_a_flat_one_cannot() -> None:
    """A message of six steps: eight ranks a node hide it, a flat ring pays for every hop."""
    network = Network(8, FREE, Link.of_rate(torch.inf, 6.0))
    flat, nested = (
        simulate(outer, 64 // outer, "forward", steps_of(1.0, 64), {"keys": 1.0}, network) for outer in (1, 8)
    )
    assert nested.seconds == pytest.approx(64)
    assert flat.seconds == pytest.approx(63 * 6 + 1)


def test_a_thousand_ranks() -> None:
    """Each rank meets every other's keys once; a straggler's time is everyone's."""
    offsets = [step.offset for step in ring_program(128, 8, "forward", False) if isinstance(step, Compute)]
    assert sorted(offsets) == list(range(1024))
    factors = [1.0] * 1023 + [1.25]
    network = Network(8, FREE, FREE)
    found = simulate(128, 8, "forward", slowed(steps_of(1.0, 1024), factors), {"keys": 1.0}, network)
    assert found.seconds == pytest.approx(1280)
    assert float(found.exposed[0]) > 200


def test_every_message_is_waited_for() -> None:
    """A pass ends with nothing under way, whatever the ring."""
    for outer, inner in ((1, 1), (1, 2), (1, 5), (2, 1), (3, 2), (4, 4)):
        for phase in ("forward", "backward"):
            program = ring_program(outer, inner, phase, True)
            begun = [step.message for step in program if isinstance(step, Send | Sum)]
            assert sorted(begun) == sorted(step.message for step in program if isinstance(step, Wait))


@pytest.mark.parametrize("outer, inner", [(1, 4), (2, 2), (2, 4), (4, 2), (3, 5)])
def test_gradients_go_to_their_owner(outer: int, inner: int) -> None:
    """Sums follow their keys round the node; from a round's last step they go to rank - offset, whose keys they are."""
    world, offset, home = outer * inner, 0, 0
    for step in ring_program(outer, inner, "backward", True):
        if isinstance(step, Compute) and step.kernel == "tiles_backward":
            offset = step.offset
        elif isinstance(step, Send) and step.payload == "gradients":
            last = offset // outer == inner - 1
            home += last
            assert (step.shift + offset) % world == 0 if last else step.shift == outer
    assert home == outer
