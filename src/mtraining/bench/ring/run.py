"""`mtraining bench ring`: ring attention over the GPUs of one machine, right first, then timed.

Its time is compared with one GPU's share of the same work. On a machine without GPUs it runs a small form, in fp32.

Gate: out and all gradients under an estimated index equal one process holding the whole sequence, in each layout.

Then forward and backward are timed under a prescribed index: 5 % of tiles, 2048 columns, 16 query and 2 kv heads of
128. They stand beside one GPU that computes the whole sequence alone. Times are medians of five after a warm-up, on the
slowest rank. ``efficiency``: the lone GPU's time over the number of GPUs, by the ring's time. ``exposed_fraction``: the
ring's share of waits.

``python -m mtraining.bench.ring`` runs where the command line's packages are missing. Both start a process for each
GPU, or are one of the processes that torchrun started. Under torchrun more processes than GPUs share them, as
`mtraining.bench.processes` says: the gate is as good, the times are not.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mtraining.bench.attention.gate import TOLERANCE
from mtraining.bench.options import RingOptions, arguments, parse
from mtraining.bench.processes import (
    gpus_in_use,
    on_gpu,
    process_count,
    start,
    take_device,
    under_torchrun,
)
from mtraining.bench.record import provenance, write_csv
from mtraining.bench.ring.gate import HEADS as GATE_HEADS
from mtraining.bench.ring.gate import RESULTS, RingCase, gate_pattern, random_inputs
from mtraining.bench.train.cases import LAYOUTS
from mtraining.errors import UserError
from mtraining.layout import build_layout
from mtraining.pattern import ToeplitzRandom
from mtraining.ring import Timeline, sparse_ring_attention
from mtraining.train.mesh import backend_for

Say = Callable[[str], None]
_ROUNDS = 6  # of which the first warms up


@dataclass(frozen=True)
class Setting:
    """What is gated and timed.

    Attributes:
        tokens: lengths of the whole sequence to time.
        heads: query heads, key heads, head_dim.
        density, columns, block_size: of the prescribed index.
        gate_tokens: length of the sequence that is compared with one process.
    """

    dtype: torch.dtype
    tokens: tuple[int, ...]
    heads: tuple[int, int, int]
    columns: int
    density: float
    block_size: int
    gate_tokens: int


ON_GPUS = Setting(torch.bfloat16, (131072, 262144, 524288), (16, 2, 128), 2048, 0.05, 128, 16384)
ON_CPUS = Setting(torch.float32, (1024, 2048), (2, 1, 16), 32, 0.3, 16, 512)


@dataclass(frozen=True)
class RingRow:
    """One length on one ring; ``ring`` is none, flat or OUTERxINNER."""

    date: str
    commit: str
    gpu: str
    gpus: int
    ranks: int
    torch: str
    seq_len: int
    density: float
    columns: int
    ring: str
    forward_ms: float
    backward_ms: float
    efficiency: float
    peak_gib: float
    exposed_fraction: float


def gate(topology: str, mesh: DeviceMesh, device: torch.device, setting: Setting, say: Say) -> bool:
    """Whether every layout gives what one process gives; the same answer on every rank."""
    right = True
    for name in LAYOUTS:
        for heads in GATE_HEADS:
            pattern = gate_pattern(setting.gate_tokens, setting.block_size)
            case = RingCase(pattern, setting.gate_tokens, name, heads, setting.dtype)
            whole = case.inputs(device)
            ours, index = case.on_ring(case.local(whole, mesh), mesh)
            errors = torch.tensor(case.errors(ours, case.alone(whole, index), mesh))
            # gloo's maximum passes over another rank's NaN.
            errors.nan_to_num_(torch.inf)
            dist.all_reduce(errors, dist.ReduceOp.MAX)
            right &= bool((errors <= TOLERANCE[setting.dtype]).all())
            found = " ".join(f"{what} {e:.1e}" for what, e in zip(RESULTS, errors.tolist(), strict=True))
            say(f"{topology} {name} {heads[0]}/{heads[1]} heads of {heads[2]}: {found}")
    return right


def now(device: torch.device) -> float | torch.cuda.Event:
    """This moment, of the device's work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(begin: Any, end: Any) -> float:
    """Between two moments of :func:`now`, once the device has reached both."""
    return float(1000 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end))


def measure(mesh: DeviceMesh | None, tokens: int, device: torch.device, setting: Setting) -> list[float]:
    """Median forward and backward milliseconds, peak GiB, and share of exposed waits, of ``tokens`` local tokens.

    Each is that of the rank where it is largest. Collective.
    """
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    q, k, v, dout = random_inputs(tokens, setting.heads, device, setting.dtype)
    for x in (q, k, v):
        x.requires_grad_()
    pattern = ToeplitzRandom(block_size=setting.block_size, density=setting.density, columns=setting.columns)
    layout = build_layout("striped", setting.block_size)
    times = []
    for _ in range(_ROUNDS):
        # Backward would add to gradients that are there.
        for x in (q, k, v):
            x.grad = None
        dist.barrier()
        # Launching is ahead of the GPU, as it is in training.
        if gpu:
            torch.cuda.synchronize()
            torch.cuda._sleep(30_000_000)
        with Timeline() as timeline:
            begin = now(device)
            out = sparse_ring_attention(q, k, v, pattern=pattern, layout=layout, mesh=mesh)
            middle = now(device)
            out.backward(dout)
            end = now(device)
        if gpu:
            torch.cuda.synchronize()
        times.append((milliseconds(begin, middle), milliseconds(middle, end), timeline.exposed_fraction))
    forward, backward, exposed = (statistics.median(column) for column in zip(*times[1:], strict=True))
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    most = torch.tensor([forward, backward, peak, exposed], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def run(device: torch.device, out: Path, setting: Setting, say: Say) -> bool:
    """Gate every ring that the ranks can form; then time every length, each row written as soon as it is known.

    Collective; the first rank writes, and only its ``say`` is told. Returns whether the gate was passed.
    """
    world, first = dist.get_world_size(), dist.get_rank() == 0
    say = say if first else lambda text: None
    meshes: dict[str, DeviceMesh] = {"flat": init_device_mesh(device.type, (world,), mesh_dim_names=("cp",))}
    if world % 2 == 0 and world > 2:
        shape, names = (2, world // 2), ("cp_outer", "cp_inner")
        meshes[f"2x{world // 2}"] = init_device_mesh(device.type, shape, mesh_dim_names=names)
    if not all(gate(name, mesh, device, setting, say) for name, mesh in meshes.items()):
        say("WRONG: no number is reported")
        return False
    say("right")
    from_here = provenance(device)
    for tokens in setting.tokens:
        alone = measure(None, tokens, device, setting)
        for topology, mesh in {"none": None, **meshes}.items():
            ranks = 1 if mesh is None else world
            gpus = gpus_in_use(ranks)
            found = alone if mesh is None else measure(mesh, tokens // world, device, setting)
            forward, backward, peak, exposed = found
            efficiency = (alone[0] + alone[1]) / gpus / (forward + backward)
            row = RingRow(
                from_here.date, from_here.commit, from_here.gpu, gpus, ranks, from_here.torch, tokens, setting.density,
                setting.columns, topology, round(forward, 2), round(backward, 2), round(efficiency, 3),
                round(peak, 2), round(exposed, 4),
            )  # fmt: skip
            path = write_csv([row], out, "ring") if first else None
            say(
                f"{tokens} tokens, ring {topology} of {ranks}: forward {forward:.2f} ms, backward {backward:.2f} ms, "
                f"efficiency {efficiency:.3f}, exposed {exposed:.1%}; wrote {path}"
            )
    return True


def bench(options: RingOptions) -> int:
    """The whole command, as one of torchrun's processes or as what starts them; 1 where a ring was wrong.

    Raises:
        UserError: bad options.
    """
    gpu = on_gpu(options.device)
    if not under_torchrun():
        processes = process_count(options.nproc, gpu)
        return start("mtraining.bench.ring", arguments(options), processes, gpu)
    device = take_device(gpu)
    dist.init_process_group(backend_for(device))
    right = run(device, options.out, ON_GPUS if gpu else ON_CPUS, lambda text: print(text, flush=True))
    dist.destroy_process_group()
    return 0 if right else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the command line's packages; 1 where a ring was wrong, 2 for bad input."""
    try:
        return bench(parse(RingOptions, "python -m mtraining.bench.ring", __doc__, argv)[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
