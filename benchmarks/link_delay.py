"""Slow links between nodes: a flat ring against a hierarchical one of two nodes, as the links get slower.

torchrun --nproc-per-node 4 benchmarks/link_delay.py OUT.csv       (GPUs over NCCL, or a small form on CPUs over gloo)

Forward and backward of one attention layer under a prescribed index (5 % of tiles on a GPU, and columns), the slowest
rank's time and the share of it spent waiting for transfers (mtraining.ring.Timeline), medians after a warm-up. Delays
are multiples of a forward ring step, so that METHOD.md section 4 can be read off: a flat ring hides a delay of one
step, a hierarchical one of as many as a node has ranks. GPUs also take bandwidths in GB/s. Results must not depend on
the links, bit for bit, or nothing is reported.

On CPUs the ranks share cores, and one that waits would lend its core to the others. So every kernel call is made to
last as long as if it had one: STEP seconds for a forward step, twice that backward, half of STEP for the gradients of
columns.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mtraining.bench.record import code_version
from mtraining.kernel import ReferenceBackend
from mtraining.layout import build_layout
from mtraining.pattern import ToeplitzRandom
from mtraining.ring import Timeline, slow_links, sparse_ring_attention

CUDA = torch.cuda.is_available()
TOKENS, HEADS, KV_HEADS, DIM, COLUMN_COUNT = (524288, 16, 2, 128, 2048) if CUDA else (1024, 2, 1, 16, 32)
DENSITY = 0.05 if CUDA else 0.3
BLOCK, REPEATS = (128, 5) if CUDA else (16, 3)
STEP = 0.06
LASTS = {"tiles_forward": 1.0, "tiles_backward": 2.0, "columns_backward": 0.5}
DELAYS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)  # forward steps
BANDWIDTHS = (50.0, 25.0, 12.5, 6.25) if CUDA else ()  # GB/s
COLUMNS = (
    "date commit device ranks node_size torch seq_len density columns ring step_ms delay_ms gb_per_second "
    "forward_ms backward_ms slowdown exposed_fraction exposed_fraction_max"
).split()


@contextmanager
def lasting_kernels() -> Iterator[None]:
    """On CPUs, every kernel call lasts as long as STEP says; on GPUs, as long as it takes."""
    originals = {} if CUDA else {name: getattr(ReferenceBackend, name) for name in LASTS}

    def lasting(kernel: Any, seconds: float) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            end = time.perf_counter() + seconds
            result = kernel(*args, **kwargs)
            time.sleep(max(0.0, end - time.perf_counter()))
            return result

        return call

    for name, kernel in originals.items():
        setattr(ReferenceBackend, name, lasting(kernel, STEP * LASTS[name]))
    try:
        yield
    finally:
        for name, kernel in originals.items():
            setattr(ReferenceBackend, name, kernel)


def measure(
    mesh: DeviceMesh, inputs: list[Tensor], repeats: int, node_size: int, **links: float
) -> tuple[list[Tensor], list[float]]:
    """out and gradients; medians of [forward ms, backward ms] of the slowest rank, exposed fraction's [mean, max]."""
    rows = []
    for _ in range(repeats + 1):
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        dist.barrier()
        with slow_links(node_size, **links), Timeline() as timeline:
            if CUDA:
                torch.cuda._sleep(60_000_000)  # so that launching is ahead of the GPU, as in training
            out = sparse_ring_attention(
                q, k, v, pattern=ToeplitzRandom(block_size=BLOCK, density=DENSITY, columns=COLUMN_COUNT),
                layout=build_layout("striped", BLOCK), mesh=mesh, kernel="auto" if CUDA else "reference",
            )  # fmt: skip
            out.backward(inputs[3])
        milliseconds = [1000 * (sum(times.compute) + sum(times.exposed)) for times in timeline.passes]
        most = torch.tensor([*milliseconds, timeline.exposed_fraction], dtype=torch.float64)
        mean = most[2:] / dist.get_world_size()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        dist.all_reduce(mean)
        rows.append([*most[:2].tolist(), mean.item(), most[2].item()])
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return [out.detach(), q.grad, k.grad, v.grad], [statistics.median(c) for c in zip(*rows[1:], strict=True)]


def main() -> int:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
    world = dist.get_world_size()
    node = world // 2
    meshes = {
        "flat": init_device_mesh(device.type, (world,), mesh_dim_names=("cp",)),
        f"2x{node}": init_device_mesh(device.type, (2, node), mesh_dim_names=("cp_outer", "cp_inner")),
    }
    torch.manual_seed(dist.get_rank())
    inputs = [
        torch.randn(1, TOKENS // world, heads, DIM, device=device).to(
            torch.bfloat16 if CUDA else torch.float32
        )
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]
    name = torch.cuda.get_device_name() if CUDA else "cpu"
    what = [date.today(), code_version(), name, world, node, torch.__version__, TOKENS, DENSITY, COLUMN_COUNT]
    rows, right = [], True
    with lasting_kernels():
        step = measure(meshes["flat"], inputs, REPEATS, node)[1][0] / 1000 / world
        settings = [(step * delay, math.inf) for delay in DELAYS] + [(0.0, 1e9 * rate) for rate in BANDWIDTHS]
        for ring, mesh in meshes.items():
            expected: list[Tensor] = []
            fastest = 0.0
            for delay, rate in settings:
                results, (forward, backward, exposed, most) = measure(
                    mesh, inputs, REPEATS, node, delay_seconds=delay, bytes_per_second=rate
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
                    print(*rows[-1][9:], flush=True)
    agreed = torch.tensor(int(right))
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        print("right" if agreed else "WRONG: no number is reported")
        if agreed:
            with open(sys.argv[1] if len(sys.argv) > 1 else "/dev/stdout", "w") as file:
                csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    dist.destroy_process_group()
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
