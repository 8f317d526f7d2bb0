"""Ring attention over the GPUs of one machine: right first, then its time against one GPU's share of the same work.

torchrun --nproc-per-node 2 benchmarks/ring.py [OUT.csv]      (on a machine without GPUs: a small form, in fp32)

Gate: out and all gradients under an estimated index equal one process holding the whole sequence, in each layout. Then
forward and backward under a prescribed index (5 % of tiles, 2048 columns, 16 query and 2 kv heads of 128), medians of
five after a warm-up on the slowest rank, beside one GPU that computes the whole sequence alone. ``efficiency``: the
lone GPU's time over the number of GPUs, by the ring's time. ``exposed_fraction``: the ring's share of waits.

More processes than GPUs share them, as `mtraining.bench.processes` tells: the gate is as good, the times are not.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mtraining.bench.attention.gate import TOLERANCE
from mtraining.bench.processes import gpus_in_use, take_device
from mtraining.bench.record import appended, code_version
from mtraining.bench.ring.gate import HEADS as GATE_HEADS
from mtraining.bench.ring.gate import RESULTS, RingCase, gate_pattern, random_inputs
from mtraining.bench.train.cases import LAYOUTS
from mtraining.layout import build_layout
from mtraining.pattern import ToeplitzRandom
from mtraining.ring import Timeline, sparse_ring_attention
from mtraining.train.mesh import backend_for

CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOKENS = (131072, 262144, 524288) if CUDA else (1024, 2048)
HEADS, COLUMN_COUNT = ((16, 2, 128), 2048) if CUDA else ((2, 1, 16), 32)
DENSITY, BLOCK = (0.05, 128) if CUDA else (0.3, 16)
COLUMNS = (
    "date commit gpu gpus ranks torch seq_len density columns ring forward_ms backward_ms efficiency peak_gib "
    "exposed_fraction"
).split()


def gate(topology: str, mesh: DeviceMesh, device: torch.device) -> bool:
    """Whether every layout gives what one process gives; the same answer on every rank."""
    tokens, right = 128 * BLOCK if CUDA else 512, True
    for name in LAYOUTS:
        for heads in GATE_HEADS:
            case = RingCase(gate_pattern(tokens, BLOCK), tokens, name, heads, DTYPE)
            whole = case.inputs(device)
            ours, index = case.on_ring(case.local(whole, mesh), mesh)
            errors = torch.tensor(case.errors(ours, case.alone(whole, index), mesh))
            errors.nan_to_num_(torch.inf)  # gloo's maximum passes over another rank's NaN
            dist.all_reduce(errors, dist.ReduceOp.MAX)
            right &= bool((errors <= TOLERANCE[DTYPE]).all())
            if dist.get_rank() == 0:
                told = " ".join(
                    f"{what} {error:.1e}" for what, error in zip(RESULTS, errors.tolist(), strict=True)
                )
                print(f"{topology} {name} {heads[0]}/{heads[1]} heads of {heads[2]}: {told}", flush=True)
    return right


def now() -> float | torch.cuda.Event:
    """This moment, of the device's work."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin: Any, end: Any) -> float:
    return float(begin.elapsed_time(end) if CUDA else 1000 * (end - begin))


def measure(mesh: DeviceMesh | None, tokens: int, device: torch.device) -> list[float]:
    """Median forward and backward milliseconds, peak GiB, and share of exposed waits, of ``tokens`` local tokens; of
    the rank where each is largest. Collective."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    q, k, v, dout = random_inputs(tokens, HEADS, device, DTYPE)
    for x in (q, k, v):
        x.requires_grad_()
    pattern = ToeplitzRandom(block_size=BLOCK, density=DENSITY, columns=COLUMN_COUNT)
    times = []
    for _ in range(6):
        for x in (q, k, v):
            x.grad = None  # or backward would add to it
        dist.barrier()
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda._sleep(30_000_000)  # so that launching is ahead of the GPU, as in training
        with Timeline() as timeline:
            start = now()
            out = sparse_ring_attention(
                q, k, v, pattern=pattern, layout=build_layout("striped", BLOCK), mesh=mesh
            )
            middle = now()
            out.backward(dout)
            end = now()
        if CUDA:
            torch.cuda.synchronize()
        times.append((milliseconds(start, middle), milliseconds(middle, end), timeline.exposed_fraction))
    forward, backward, exposed = (statistics.median(column) for column in zip(*times[1:], strict=True))
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    most = torch.tensor([forward, backward, peak, exposed], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def report(path: Path, meshes: dict[str, DeviceMesh], device: torch.device) -> None:
    """Time every length, each row written as soon as it is known. Collective; the first rank writes."""
    world, first = dist.get_world_size(), dist.get_rank() == 0
    what = [date.today(), code_version(), torch.cuda.get_device_name() if CUDA else "cpu"]
    with appended(path if first else Path(os.devnull), COLUMNS) as add:
        for tokens in TOKENS:
            alone = measure(None, tokens, device)
            for topology, mesh in {"none": None, **meshes}.items():
                ranks = 1 if mesh is None else world
                gpus = gpus_in_use(ranks)
                forward, backward, peak, exposed = (
                    alone if mesh is None else measure(mesh, tokens // world, device)
                )
                efficiency = (alone[0] + alone[1]) / gpus / (forward + backward)
                shape = [gpus, ranks, torch.__version__, tokens, DENSITY, COLUMN_COUNT, topology]
                times = [round(forward, 2), round(backward, 2), round(efficiency, 3), round(peak, 2)]
                add([*what, *shape, *times, round(exposed, 4)])
                if first:
                    print(
                        f"{tokens} tokens, ring {topology} of {ranks}: forward {forward:.2f} ms, backward "
                        f"{backward:.2f} ms, efficiency {efficiency:.3f}, exposed {exposed:.1%}",
                        flush=True,
                    )


def main() -> int:
    device = take_device(CUDA)
    dist.init_process_group(backend_for(device))
    world = dist.get_world_size()
    meshes = {"flat": init_device_mesh(device.type, (world,), mesh_dim_names=("cp",))}
    if world % 2 == 0 and world > 2:
        shape, names = (2, world // 2), ("cp_outer", "cp_inner")
        meshes[f"2x{world // 2}"] = init_device_mesh(device.type, shape, mesh_dim_names=names)
    right = all(gate(name, mesh, device) for name, mesh in meshes.items())
    if dist.get_rank() == 0:
        print("right" if right else "WRONG: no number is reported", flush=True)
    if right:
        report(Path(sys.argv[1] if len(sys.argv) > 1 else os.devnull), meshes, device)
    dist.destroy_process_group()
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
