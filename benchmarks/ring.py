"""Ring attention over the GPUs of one machine: right first, then its time against one GPU's share of the same work.

torchrun --nproc-per-node 2 benchmarks/ring.py [OUT.csv]      (on a machine without GPUs: a small form, in fp32)

Gate: out and all gradients under an estimated index equal one process holding the whole sequence, in each layout. Then
forward and backward under a prescribed index (5 % of tiles, 2048 columns, 16 query and 2 kv heads of 128), medians of
five after a warm-up on the slowest rank, beside one GPU that computes the whole sequence alone. ``efficiency``: the
lone GPU's time over the number of GPUs, by the ring's time. ``exposed_fraction``: the ring's share of waits.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mtraining.bench.record import appended, code_version
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.pattern import Pattern, SequenceShard, ToeplitzRandom, VerticalSlash
from mtraining.ring import Ring, Timeline, sparse_ring_attention

CUDA = torch.cuda.is_available()
DTYPE, TOLERANCE = (torch.bfloat16, 4e-3) if CUDA else (torch.float32, 1e-5)
TOKENS = (131072, 262144, 524288) if CUDA else (1024, 2048)
HEADS, KV_HEADS, DIM, COLUMN_COUNT = (16, 2, 128, 2048) if CUDA else (2, 1, 16, 32)
DENSITY, BLOCK = (0.05, 128) if CUDA else (0.3, 16)
COLUMNS = (
    "date commit gpu gpus torch seq_len density columns ring forward_ms backward_ms efficiency peak_gib "
    "exposed_fraction"
).split()


@dataclass(frozen=True)
class Given(Pattern):
    """An index decided elsewhere."""

    index: SparseIndex | None = None
    name = "given"

    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        assert self.index is not None
        return self.index


def random_inputs(tokens: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> list[Tensor]:
    """q, k, v, dout."""
    return [
        torch.randn(1, tokens, h, dim, device=device).to(DTYPE) for h in (heads, kv_heads, kv_heads, heads)
    ]


def forward_backward(inputs: list[Tensor], **options: Any) -> tuple[list[Tensor], SparseIndex]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out, index = sparse_ring_attention(q, k, v, return_index=True, **options)
    out.backward(inputs[3])
    return [x.detach() for x in (out, q.grad, k.grad, v.grad)], index


def gate(topology: str, mesh: DeviceMesh, device: torch.device) -> bool:
    """Whether every layout gives what one process gives; the same answer on every rank."""
    tokens, block = 128 * BLOCK if CUDA else 512, BLOCK
    ring, right = Ring.over(mesh), True
    options = {
        "max_columns": tokens // 16,
        "sinks": 8,
        "slash_by": "block",
        "slash_density": 0.3,
        "window": block,
    }
    pattern = VerticalSlash(block_size=block, top_p=0.9, **options)
    for name in ("striped", "zigzag", "contiguous"):
        for heads, kv_heads, dim in ((16, 2, 128), (9, 3, 64)):
            torch.manual_seed(1)
            layout, whole = build_layout(name, block), random_inputs(tokens, heads, kv_heads, dim, device)
            mine = [layout.shard(x, ring.rank, ring.world) for x in whole]
            ours, index = forward_backward(mine, pattern=pattern, layout=layout, mesh=mesh)
            joined = [layout.unshard(ring.all_gather(x.contiguous()).unbind(0)) for x in ours]
            alone, _ = forward_backward(whole, pattern=Given(block, index), layout=layout, mesh=None)
            errors = [
                float((a - b).float().norm() / b.float().norm()) for a, b in zip(joined, alone, strict=True)
            ]
            right &= max(errors) <= TOLERANCE
            if dist.get_rank() == 0:
                print(
                    f"{topology} {name} {heads}/{kv_heads} heads of {dim}: "
                    + " ".join(f"{error:.1e}" for error in errors),
                    flush=True,
                )
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
    q, k, v, dout = random_inputs(tokens, HEADS, KV_HEADS, DIM, device)
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
                gpus = 1 if mesh is None else world
                forward, backward, peak, exposed = (
                    alone if mesh is None else measure(mesh, tokens // world, device)
                )
                efficiency = (alone[0] + alone[1]) / gpus / (forward + backward)
                shape = [gpus, torch.__version__, tokens, DENSITY, COLUMN_COUNT, topology]
                times = [round(forward, 2), round(backward, 2), round(efficiency, 3), round(peak, 2)]
                add([*what, *shape, *times, round(exposed, 4)])
                if first:
                    print(
                        f"{tokens} tokens, ring {topology} of {gpus}: forward {forward:.2f} ms, backward "
                        f"{backward:.2f} ms, efficiency {efficiency:.3f}, exposed {exposed:.1%}",
                        flush=True,
                    )


def main() -> int:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
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
