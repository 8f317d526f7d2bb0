"""Transfers are in flight while a step computes, one message a step, and no sooner or later than the schedule says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.layout import build_layout
from mtraining.pattern import VerticalSlash
from mtraining.predict.trace import META, LiveBytes, ShapeRing, shape_call
from mtraining.ring import Ring, attention, links, sparse_ring_attention
from mtraining.ring.schedule import GradientRing, ring_steps
from mtraining.ring.topology import Hop


def schedule_job(
    worker: Worker, topology: tuple[int, ...]
) -> tuple[list[str], list[str], list[int], float, float]:
    """What happened in which order on this rank to keys and to gradients, the sources met, and the gradient that came
    home."""
    mesh = worker.ring_mesh(topology)
    ring, events = Ring.over(mesh), []
    start, wait = Hop.__init__, Hop.wait

    def noted_start(hop: Hop, payload: Tensor, group: object, to: int, sender: int) -> None:
        events.append("outer sent" if group is ring._whole_group and ring.outer > 1 else "inner sent")
        start(hop, payload, group, to, sender)  # type: ignore[arg-type]

    def noted_wait(hop: Hop) -> Tensor:
        events.append("waited")
        return wait(hop)

    Hop.__init__, Hop.wait = noted_start, noted_wait  # type: ignore[method-assign]
    try:
        sources, home = [], GradientRing(ring)
        own = torch.full((2, 3), float(ring.rank))
        for step, payload in ring_steps(own, ring):
            assert (payload == step.source).all(), "the payload must be the source's"
            events.append("compute")
            sources.append(step.source)
        forward = list(events)
        backward = list(ring_steps(own, ring, own_node_last=True))
        assert all((payload == step.source).all() for step, payload in backward)
        events.clear()
        for step, _ in backward:
            events.append(f"{step.outer}.{step.inner}")
            home.add(torch.full((2, 3), 100.0 * step.source + 1), step)
        total = home.finish()
    finally:
        Hop.__init__, Hop.wait = start, wait  # type: ignore[method-assign]
    return forward, events, sources, float(total.min()), float(total.max())


@pytest.mark.parametrize("topology", [(4,), (2, 2), (2, 4), (4, 2)], ids=str)
def test_next_transfer_is_in_flight_during_compute(pool: ProcessPool, topology: tuple[int, ...]) -> None:
    world = math.prod(topology)
    outer, inner = topology if len(topology) == 2 else (1, *topology)
    results = pool.run(schedule_job, world=world, topology=topology)
    expected = []
    for outer_step in range(outer):
        last_round = outer_step + 1 == outer
        expected += [] if last_round else ["outer sent"]  # hidden behind every step of the round
        for inner_step in range(inner):
            last_step = inner_step + 1 == inner
            expected += ["compute"] if last_step else ["inner sent", "compute", "waited"]
        expected += [] if last_round else ["waited"]
    for events, _, sources, *_ in results:
        assert events == expected
        assert sorted(sources) == list(range(world)), "every source is met once"
    for step in range(world):  # at each step all ranks hold keys at one and the same rank distance
        assert len({(sources[0] - sources[step]) % world for _, _, sources, *_ in results}) == 1


@pytest.mark.parametrize("topology", [(2,), (4,), (2, 2), (3, 2), (2, 4), (4, 2), (4, 1)], ids=str)
def test_gradients_come_home_with_every_share(pool: ProcessPool, topology: tuple[int, ...]) -> None:
    world = math.prod(topology)
    for _, _, sources, low, high in pool.run(schedule_job, world=world, topology=topology):
        assert low == high == world * (100.0 * sources[0] + 1)


IN, OUT, WAIT = "inner sent", "outer sent", "waited"
BACKWARD = {
    (3,): ["0.0", IN, "0.1", WAIT, IN, "0.2", WAIT, IN, WAIT],
    # One message between nodes for each other node, collected when two younger ones are under way, or at the end.
    (2, 2): ["0.0", IN, "1.0", IN, "1.1", WAIT, OUT, "0.1", WAIT, IN, WAIT, WAIT],
    (3, 2): ["0.0", IN, "1.0", IN, "1.1", WAIT, OUT, "2.0", IN, "2.1", WAIT, OUT, "0.1", WAIT, IN, WAIT, WAIT, WAIT],
    (2, 3): ["0.0", IN, "0.1", WAIT, IN, "1.0", IN, "1.1", WAIT, IN, "1.2", WAIT, OUT, "0.2", WAIT, IN, WAIT, WAIT],
    (4, 1): ["0.0", "1.0", OUT, "2.0", OUT, "3.0", OUT, WAIT, WAIT, WAIT],
}  # fmt: skip


@pytest.mark.parametrize("topology", BACKWARD, ids=str)
def test_gradients_travel_while_steps_compute(pool: ProcessPool, topology: tuple[int, ...]) -> None:
    for _, events, *_ in pool.run(schedule_job, world=math.prod(topology), topology=topology):
        assert events == BACKWARD[topology]


@pytest.mark.parametrize(
    ("topology", "most"),
    [((1, 2), 2), ((1, 4), 2), ((1, 8), 2), ((2, 2), 4), ((2, 4), 4), ((4, 4), 4)],
    ids=str,
)
@pytest.mark.parametrize("own_node_last", [False, True])
def test_transfers_are_double_buffered(topology: tuple[int, int], most: int, own_node_last: bool) -> None:
    """Two payloads at a time in a flat ring; two more between nodes, and the two where the own node's turn stopped."""
    size, live = 1000, LiveBytes()
    with live:
        for _, payload in ring_steps(
            torch.zeros(size, dtype=torch.uint8, device=META),
            ShapeRing(*topology),
            own_node_last=own_node_last,
        ):
            del payload
    assert live.peaks["start"] <= (most + 2 * (own_node_last and topology[0] > 2)) * size
    assert live.live == 0


def pass_peaks(world: int) -> dict[str, float]:
    """Most memory of a forward and a backward pass of one attention call, in keys and values of one rank."""
    local = 1024
    call = shape_call(
        VerticalSlash(block_size=16), build_layout("striped", 16), (1, world), local * world, 1, 4, 0
    )
    q, k, v, dout = (torch.zeros(1, local, h, 64, dtype=torch.bfloat16, device=META) for h in (4, 2, 2, 4))
    live = LiveBytes()
    live.ignore([q, k, v, dout, call.index.diagonals, call.index.columns])
    with live:
        live.begin("forward")
        out, lse = attention.ring_forward(q, k, v, call)
        live.begin("backward")
        attention.ring_backward(dout, q, k, v, out, lse, call)
    return {phase: peak / (2 * k.nbytes) for phase, peak in live.peaks.items()}


def test_attention_lets_go_of_what_it_has_used() -> None:
    """More ranks take no more; shares of dk and dv are made in the one tensor that is sent, never copied."""
    two, three, eight = pass_peaks(2), pass_peaks(3), pass_peaks(8)
    assert two["forward"] == three["forward"] == eight["forward"]
    assert two["backward"] <= three["backward"] == eight["backward"] < 11.1


def message_job(worker: Worker, topology: tuple[int, ...]) -> tuple[list[Any], list[Any], list[Any]]:
    """What this rank sends in forward and in backward, as (shape, dtype), and the same of sums over the ring."""
    mesh = worker.ring_mesh(topology)
    pattern = VerticalSlash(block_size=8, top_p=None, top_k_columns=8, top_k_slashes=3, sinks=2, window=2)
    q, k, v = (torch.randn(2, 16, heads, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    sent: list[Any] = []
    sums: list[Any] = []
    send, start_sum = links.begin_transfer, Ring.start_sum

    def noted_send(one: Any, other: Any) -> Any:
        sent.append((tuple(one.tensor.shape), one.tensor.dtype))
        return send(one, other)

    def noted_sum(ring: Ring, x: Tensor) -> Any:
        sums.append((tuple(x.shape), x.dtype))
        return start_sum(ring, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtraining.ring.topology.begin_transfer", noted_send)
        patch.setattr(Ring, "start_sum", noted_sum)
        out = sparse_ring_attention(q, k, v, pattern=pattern, layout=build_layout("striped", 8), mesh=mesh)
        forward, estimated = len(sent), len(sums)
        out.sum().backward()
    return sent[:forward], sent[forward:], sums[estimated - 1 :]


@pytest.mark.parametrize("topology", [(4,), (2, 2)], ids=str)
def test_keys_and_values_are_one_message_and_so_are_their_gradients(
    pool: ProcessPool, topology: tuple[int, ...]
) -> None:
    pair, columns = (2, 2, 16, 2, 16), (2, 2, 8, 4, 16)
    world = math.prod(topology)
    keys = (pair, torch.bfloat16)
    for forward, backward, sums in pool.run(message_job, world=world, topology=topology):
        assert forward == [keys] * 3, "every other rank's keys and values, once"
        # three hops with shares, or one in each round; and the ways home
        gradients = [(pair, torch.float32)] * 4
        assert sorted(backward, key=str) == sorted([keys] * 3 + gradients, key=str)
        # keys at the columns: forward, backward, and their gradients
        assert sums == [(columns, torch.bfloat16)] * 2 + [(columns, torch.float32)]


def rejoin_job(worker: Worker) -> tuple[bool, bool]:
    """Whether one mesh keeps its ring, and whether an equal mesh over groups made anew still has the old one."""
    import tempfile

    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    def join(store: str) -> DeviceMesh:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        return DeviceMesh("cpu", [0], mesh_dim_names=("cp",))

    dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        mesh = join(folder + "/first")
        first, again = Ring.over(mesh), Ring.over(mesh)
        dist.destroy_process_group()
        second = Ring.over(join(folder + "/second"))
    return first is again, first is second


def test_groups_made_anew_make_another_ring() -> None:
    """A notebook that leaves its process groups and joins again must not send through the old ones."""
    own = ProcessPool()
    try:
        assert own.run(rejoin_job, world=1) == [(True, False)]
    finally:
        own.close()
