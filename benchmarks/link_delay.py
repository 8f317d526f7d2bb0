"""Slow links between nodes: a flat ring against a hierarchical one of two nodes, as the links get slower.

torchrun --nproc-per-node 4 benchmarks/link_delay.py OUT.csv       (GPUs over NCCL, or a small form on CPUs over gloo)

What is timed: forward and backward of one attention layer under a prescribed index (5 % of tiles on a GPU, and
columns). What is told: the slowest rank's time, and the share of it spent waiting for transfers
(mtraining.ring.Timeline), medians after a warm-up. Delays are multiples of a forward ring step, so that
docs/how/rings.md can be read off: a flat ring hides a delay of one step, a hierarchical one of as many as a node has
ranks. GPUs also take bandwidths in GB/s. Results must not depend on the links, bit for bit, or nothing is reported.

More processes than GPUs share them (mtraining.bench.processes): ranks on a GPU take turns, and every message between
pretended nodes goes through sockets. That is slow beside the computing of 5 %. So take fewer tokens and more density:
--tokens 262144 --density 0.5 --delays 0 1 2 3 --repeats 2.

On CPUs the ranks share cores, and one that waits would lend its core to the others. So every kernel call is made to
last as long as if it had one: STEP seconds for a forward step, twice that backward, half of STEP for the gradients of
columns.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mtraining.bench.processes import gpus_in_use, leave, take_device
from mtraining.bench.record import code_version
from mtraining.bench.ring.gate import random_inputs
from mtraining.kernel import ReferenceBackend
from mtraining.layout import build_layout
from mtraining.pattern import Pattern, ToeplitzRandom
from mtraining.ring import Timeline, slow_links, sparse_ring_attention
from mtraining.train.mesh import backend_for

CUDA = torch.cuda.is_available()
TOKENS, HEADS, COLUMN_COUNT = (524288, (16, 2, 128), 2048) if CUDA else (1024, (2, 1, 16), 32)
DENSITY = 0.05 if CUDA else 0.3
BLOCK, REPEATS = (128, 5) if CUDA else (16, 3)
STEP = 0.06
# "query_gradient" is what tiles_backward leaves to do.
LASTS = {"tiles_forward": 1.0, "tiles_backward": 1.0, "query_gradient": 1.0, "columns_backward": 0.5}
DELAYS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # forward steps
BANDWIDTHS = (50.0, 25.0, 12.5, 6.25) if CUDA else ()  # GB/s
COLUMNS = (
    "date commit device gpus ranks node_size torch seq_len density columns ring step_ms delay_ms gb_per_second "
    "forward_ms backward_ms slowdown exposed_fraction exposed_fraction_max"
).split()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="CSV to write")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the whole sequence")
    parser.add_argument("--density", type=float, default=DENSITY, help="share of tiles, besides columns")
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help="measurements of each link, after a first"
    )
    parser.add_argument("--delays", type=float, nargs="+", default=DELAYS, help="in forward steps, 0 first")
    parser.add_argument("--bandwidths", type=float, nargs="*", default=BANDWIDTHS, help="in GB/s")
    return parser.parse_args()


@contextmanager
def lasting_kernels() -> Iterator[None]:
    """On CPUs, every kernel call lasts as long as STEP says; on GPUs, as long as it takes."""
    methods = [] if CUDA else [name for name in LASTS if hasattr(ReferenceBackend, name)]
    originals = {name: getattr(ReferenceBackend, name) for name in methods}

    def lasting(name: str, kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            end = time.perf_counter() + STEP * LASTS[name]
            result = kernel(*args, **kwargs)
            time.sleep(max(0.0, end - time.perf_counter()))
            if name == "tiles_backward":
                return result[0], lasting("query_gradient", result[1])
            return result

        return call

    for name, kernel in originals.items():
        setattr(ReferenceBackend, name, lasting(name, kernel))
    try:
        yield
    finally:
        for name, kernel in originals.items():
            setattr(ReferenceBackend, name, kernel)


def measure(
    mesh: DeviceMesh, pattern: Pattern, inputs: list[Tensor], repeats: int, node_size: int, **links: float
) -> tuple[list[Tensor], list[float]]:
    """out and gradients; medians of [forward ms, backward ms, forward's computing ms] of the slowest rank, exposed
    fraction's [max, mean]."""
    rows = []
    for _ in range(repeats + 1):
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        dist.barrier()
        with slow_links(node_size, **links), Timeline() as timeline:
            if CUDA:
                torch.cuda._sleep(60_000_000)  # so that launching is ahead of the GPU, as in training
            out = sparse_ring_attention(
                q, k, v, pattern=pattern, layout=build_layout("striped", BLOCK), mesh=mesh,
                kernel="auto" if CUDA else "reference",
            )  # fmt: skip
            out.backward(inputs[3])
        milliseconds = [1000 * (sum(times.compute) + sum(times.exposed)) for times in timeline.passes]
        computing = 1000 * sum(timeline.passes[0].compute)
        most = torch.tensor([*milliseconds, computing, timeline.exposed_fraction], dtype=torch.float64)
        mean = most[3:] / dist.get_world_size()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(mean)
        rows.append([*most.tolist(), mean.item()])
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [out.detach(), q.grad, k.grad, v.grad], [statistics.median(c) for c in zip(*rows[1:], strict=True)]


def main() -> int:
    options = parse()
    device = take_device(CUDA)
    dist.init_process_group(backend_for(device))
    world = dist.get_world_size()
    node = world // 2
    meshes = {
        "flat": init_device_mesh(device.type, (world,), mesh_dim_names=("cp",)),
        f"2x{node}": init_device_mesh(device.type, (2, node), mesh_dim_names=("cp_outer", "cp_inner")),
    }
    torch.manual_seed(dist.get_rank())
    inputs = random_inputs(options.tokens // world, HEADS, device, torch.bfloat16 if CUDA else torch.float32)
    pattern = ToeplitzRandom(block_size=BLOCK, density=options.density, columns=COLUMN_COUNT)
    name, repeats = torch.cuda.get_device_name() if CUDA else "cpu", options.repeats
    what = [date.today(), code_version(), name, gpus_in_use(world), world, node, torch.__version__]
    what += [options.tokens, options.density, COLUMN_COUNT]
    rows, right = [], True
    with lasting_kernels():
        step = measure(meshes["flat"], pattern, inputs, repeats, node)[1][2] / 1000 / world
        settings = [(step * delay, math.inf) for delay in options.delays]
        settings += [(0.0, 1e9 * rate) for rate in options.bandwidths]
        for ring, mesh in meshes.items():
            expected: list[Tensor] = []
            fastest = 0.0
            for delay, rate in settings:
                results, (forward, backward, _, most, exposed) = measure(
                    mesh, pattern, inputs, repeats, node, delay_seconds=delay, bytes_per_second=rate
                )
                expected, fastest = expected or results, fastest or forward + backward
                right &= all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
                links = [
                    round(1000 * step, 2),
                    round(1000 * delay, 2),
                    "" if rate == math.inf else rate / 1e9,
                ]
                times = [round(forward, 2), round(backward, 2), round((forward + backward) / fastest, 3)]
                rows.append([*what, ring, *links, *times, round(exposed, 4), round(most, 4)])
                if dist.get_rank() == 0:
                    print(*rows[-1][len(what) :], flush=True)
    agreed = torch.tensor(int(right))
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        print("right" if agreed else "WRONG: no number is reported")
        if agreed:
            with options.out.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    dist.destroy_process_group()
    return 0 if agreed else 1


if __name__ == "__main__":
    leave(main())
