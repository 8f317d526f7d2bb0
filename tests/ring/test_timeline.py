"""The timeline sees what a transfer costs: all of it when nothing is computed, nothing when computing takes longer."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distributed import ProcessPool, Worker
from mtraining.errors import UserError
from mtraining.kernel.reference.attention import ReferenceBackend
from mtraining.layout import build_layout
from mtraining.pattern import VerticalSlash
from mtraining.ring import AttentionRuntime, IndexTape, RingTimes, Timeline, slow_links, sparse_ring_attention

OPTIONS = {"block_size": 8, "top_p": None, "top_k_columns": 8, "top_k_slashes": 3, "sinks": 2, "window": 2}
DELAY = 0.15  # seconds a message: far above what the attention of 64 tokens takes, and above a busy machine's noise


def inputs() -> list[Tensor]:
    return [torch.randn(1, 64, heads, 16, requires_grad=True) for heads in (4, 2, 2)]


def slow_job(
    worker: Worker, compute: float, delay: float, node_size: int = 1, topology: tuple[int, ...] | None = None
) -> tuple[list[RingTimes], float, float]:
    """Forward and backward; each kernel takes ``compute`` seconds more, each message between nodes ``delay``."""
    mesh = worker.mesh() if topology is None else worker.mesh(topology, ("cp_outer", "cp_inner"))

    def slowed(kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            time.sleep(compute)
            result = kernel(*args, **kwargs)
            if isinstance(result, tuple) and callable(
                result[1]
            ):  # the rest of tiles_backward, a kernel as well
                return result[0], slowed(result[1])
            return result

        return call

    names = ("tiles_forward", "tiles_backward", "columns_backward")
    originals = {name: getattr(ReferenceBackend, name) for name in names}
    tensors, layout = inputs(), build_layout("striped", 8)

    def step() -> None:
        out = sparse_ring_attention(
            *tensors, pattern=VerticalSlash(**OPTIONS), layout=layout, mesh=mesh, kernel="reference"
        )
        out.sum().backward()

    step()  # what is made once is made here
    dist.barrier()
    try:
        for name, kernel in originals.items():
            setattr(ReferenceBackend, name, slowed(kernel))
        with slow_links(node_size=node_size, delay_seconds=delay), Timeline() as timeline:
            step()
    finally:
        for name, kernel in originals.items():
            setattr(ReferenceBackend, name, kernel)
    return timeline.passes, timeline.exposed, timeline.exposed_fraction


def test_without_computing_every_transfer_is_exposed(pool: ProcessPool) -> None:
    for passes, exposed, fraction in pool.run(slow_job, world=2, compute=0.0, delay=DELAY):
        assert [times.phase for times in passes] == ["forward", "backward"]
        assert [len(times.compute) for times in passes] == [2, 2]
        # forward: keys and values, and columns; backward: the same, their gradients home, and two hops of gradients
        assert exposed > 6.2 * DELAY
        assert min(passes[0].exposed) > 0.7 * DELAY
        assert passes[1].exposed[1] > 3.2 * DELAY, "columns, and all gradients' way home"
        assert fraction > 0.5


def test_computing_hides_transfers(pool: ProcessPool) -> None:
    """Keys and columns under the first step, columns' gradients under the second, the last of all under its dq."""
    runs = [pool.run(slow_job, world=2, compute=2.4 * DELAY, delay=DELAY) for _ in range(2)]
    best = min(
        runs, key=lambda ranks: sum(exposed for _, exposed, _ in ranks)
    )  # the other had a busy machine
    for _, exposed, fraction in best:
        assert exposed < 0.6 * DELAY
        assert fraction < 0.2


@pytest.mark.slow
def test_links_between_nodes_slow_a_flat_ring_and_not_a_hierarchical_one(pool: ProcessPool) -> None:
    """docs/how/rings.md, on two nodes of two: messages that take as long as 1.5 steps."""
    step, delay = 0.12, 0.18

    def run(topology: tuple[int, ...] | None) -> list[tuple[list[RingTimes], float, float]]:
        return pool.run(slow_job, world=4, compute=step, delay=delay, node_size=2, topology=topology)

    flat = run(None)
    for passes, exposed, _ in flat:
        assert sum(passes[0].exposed) > 1.5 * (delay - step), (
            "two of three transfers have but one step to hide under"
        )
        assert exposed > 3 * step
    # A wait for a rank that a busy machine held up looks the same, so the best of three.
    nested = min((run((2, 2)) for _ in range(3)), key=lambda ranks: sum(exposed for _, exposed, _ in ranks))
    assert all(len(passes[0].exposed) == 4 for passes, *_ in nested)
    for place in (1, 2):  # seconds, and the fraction
        assert sum(rank[place] for rank in nested) < sum(rank[place] for rank in flat) / 2


def test_links_within_a_node_are_not_slowed(pool: ProcessPool) -> None:
    for _, exposed, _ in pool.run(slow_job, world=2, compute=0.0, delay=2.0, node_size=2):
        assert exposed < 2.0


def calls(compiled: bool, tape: IndexTape | None) -> Timeline:
    q, k, v = inputs()
    runtime = AttentionRuntime(VerticalSlash(**OPTIONS), build_layout("striped", 8), None)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return runtime(q, k, v) * 2

    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with Timeline() as timeline:
        if tape is None:
            out = call(q, k, v)
        else:
            context = lambda: (tape.record(), tape.replay())  # noqa: E731
            out = checkpoint(call, q, k, v, use_reentrant=False, context_fn=context)
        out.sum().backward()
    call(q, k, v).sum().backward()  # no longer timed
    return timeline


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("tape", "phases"),
    [
        (None, ["forward", "backward"]),
        (IndexTape(), ["forward", "forward", "backward"]),
        (IndexTape(keep_outputs=True), ["forward", "backward"]),
    ],
    ids=["none", "full", "keep_attention"],
)
def test_recompute_and_compiled_code_are_timed(
    tape: IndexTape | None, phases: list[str], compiled: bool
) -> None:
    torch._dynamo.reset()
    timeline = calls(compiled, tape)
    assert [times.phase for times in timeline.passes] == phases
    assert all(times.compute[0] > 0 and times.exposed == [0.0] for times in timeline.passes)
    assert timeline.exposed_fraction == 0.0


def test_sums_over_passes() -> None:
    timeline = Timeline()
    assert timeline.exposed_fraction == 0.0
    timeline.passes += [
        RingTimes("forward", [1.0, 2.0], [0.5, 0.0]),
        RingTimes("backward", [4.0, 5.0], [0.0, 1.0]),
        RingTimes("forward", [1.0, 1.0], [0.5, 0.0]),
    ]
    assert timeline.by_step("forward") == ([2.0, 3.0], [1.0, 0.0])
    assert timeline.by_step("backward") == ([4.0, 5.0], [0.0, 1.0])
    assert timeline.exposed_fraction == pytest.approx(2 / 16)


@pytest.mark.parametrize(
    "options",
    [
        {"node_size": 0},
        {"node_size": 1, "delay_seconds": -1},
        {"node_size": 1, "delay_seconds": float("nan")},
        {"node_size": 1, "delay_seconds": float("inf")},
        {"node_size": 1, "bytes_per_second": 0},
        {"node_size": 1, "bytes_per_second": float("nan")},
    ],
)
def test_impossible_links_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"slow_links: node_size=.* is no network"), slow_links(**options):
        pass
