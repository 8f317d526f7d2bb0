"""Transfers are in flight while a step computes, one message a step, and no sooner or later than the schedule says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.ring import Ring
from mtraining.ring.schedule import GradientRing, ring_steps
from mtraining.ring.topology import Hop


def schedule_job(
    worker: Worker, topology: tuple[int, ...]
) -> tuple[list[str], list[str], list[int], float, float]:
    """What happened in which order on this rank to keys and to gradients, the sources met, and the gradient that came
    home."""
    mesh = worker.mesh() if len(topology) == 1 else worker.mesh(topology, ("cp_outer", "cp_inner"))
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
        for source, payload in ring_steps(own, ring):
            assert (payload == source).all(), "the payload must be the source's"
            events.append("compute")
            sources.append(source)
        forward = list(events)
        events.clear()
        for source in sources:
            home.add(torch.full((2, 3), 100.0 * source + 1))
            events.append("compute")
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


@pytest.mark.parametrize("topology", [(2,), (4,), (2, 2), (2, 4), (4, 2)], ids=str)
def test_gradients_come_home_with_every_share(pool: ProcessPool, topology: tuple[int, ...]) -> None:
    world = math.prod(topology)
    for _, _, sources, low, high in pool.run(schedule_job, world=world, topology=topology):
        assert low == high == world * (100.0 * sources[0] + 1)


@pytest.mark.parametrize("topology", [(4,), (2, 2), (3, 2), (2, 4), (4, 1)], ids=str)
def test_gradients_travel_while_steps_compute(pool: ProcessPool, topology: tuple[int, ...]) -> None:
    """One hop a step, and a round's sum goes home across nodes once, under the whole next round."""
    world = math.prod(topology)
    outer, inner = topology if len(topology) == 2 else (1, *topology)
    expected: list[str] = []
    for outer_step in range(outer):
        for inner_step in range(inner):
            expected += ["waited"] if inner_step else []
            if inner_step + 1 < inner:
                expected += ["inner sent"]
            else:  # the round before has come home by now
                came_by_hop = inner > 1 or outer_step > 1
                expected += ["waited"] if outer_step and came_by_hop else []
                expected += ["outer sent"] if outer_step else ["inner sent"] if inner > 1 else []
            expected += ["compute"]
    expected += ["waited"]
    for _, events, *_ in pool.run(schedule_job, world=world, topology=topology):
        assert events == expected


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
