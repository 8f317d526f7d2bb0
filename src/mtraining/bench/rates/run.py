"""`mtraining bench rates`: measure what `mtraining plan` must know of a GPU, and write it to a file.

One process a GPU. The first one times kernels, while the others wait; then all of them time messages between each
other, so that the link inside a machine is known. Links between machines are not timed: `mtraining plan --inter` says
what they give. Rates, not results, are measured: `mtraining bench attention` says whether the kernels are right.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtraining.bench.attention.cases import Case
from mtraining.bench.options import RatesOptions, arguments, parse
from mtraining.bench.processes import on_gpu, process_count, start, take_device, under_torchrun
from mtraining.bench.rates.kernels import Rater, Say, Sizes
from mtraining.bench.record import provenance
from mtraining.bench.timing import wait
from mtraining.bench.train.cases import SHAPES
from mtraining.errors import UserError
from mtraining.inputs.text import replace_text
from mtraining.predict.measured import own_path
from mtraining.predict.memory import GIB
from mtraining.train.mesh import backend_for

_K, _MIB = 1024, 2**20
ON_GPUS = Sizes(
    # As long as training: at 128K tokens a tile was seen to take up to 15 % longer than at 32K.
    many=Case(128 * _K, 32, 8, 128, 27),
    few=Case(128 * _K, 32, 8, 128, 7),
    columns=Case(128 * _K, 16, 2, 128, 26, 2048),
    dense=Case(64 * _K, 16, 2, 128, None),
    shape=SHAPES["qwen2.5-3b"],
    tokens=16 * _K,
    copied=2**30,
    messages=tuple(size * _MIB for size in (1, 8, 64, 256, 512)),
)
_TINY: dict[str, Any] = {"block_size": 32, "dtype": torch.float32}
ON_CPUS = Sizes(
    many=Case(1024, 2, 1, 16, 12, **_TINY),
    few=Case(1024, 2, 1, 16, 2, **_TINY),
    columns=Case(1024, 2, 1, 16, 4, 512, **_TINY),
    dense=Case(512, 2, 1, 16, None, **_TINY),
    shape=SHAPES["tiny"],
    tokens=256,
    copied=_MIB,
    messages=(_K, 64 * _MIB),
)
_REPEATS = 5


def measure_rates(rater: Rater, head_dims: Sequence[int]) -> dict[str, Any]:
    """All that one GPU can tell, as a rates file has it, without its links."""
    flops = rater.matmul_flops()
    rater.say(f"products: {flops / 1e12:.3g} TFLOP/s")
    memory, host = rater.memory_bytes(), rater.host_bytes()
    to_host = "" if host is None else f", to the host {host / 1e9:.3g} GB/s"
    rater.say(f"memory: {memory / 1e9:.4g} GB/s{to_host}")
    attention = {str(size): rater.attention(size) for size in head_dims}
    estimate = rater.estimate_seconds()
    rater.say(f"estimation of an index: {1e9 * estimate:.3g} ns for each token and head")
    logits, around = rater.around(flops)
    return {
        "matmul_tflops": round(flops / 1e12, 6),
        "memory_gb_per_s": round(memory / 1e9, 3),
        "attention": attention,
        "logit_ps": logits,
        "around_gb_per_s": around,
        "estimate_ns": round(1e9 * estimate, 4),
        "host_gb_per_s": None if host is None else round(host / 1e9, 2),
    }


def measure_link(sizes: Sequence[int], device: torch.device) -> list[list[float]] | None:
    """[bytes, seconds] of each size: the slowest rank's median of a message to the next one and from the one before, at
    once. None for a lone process. Collective.

    Raises:
        UserError: on all ranks, the longest message took no longer than the one before, so that there is no rate.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 1:
        return None
    points = []
    for size in sizes:
        sent = torch.zeros(size, dtype=torch.int8, device=device)
        received = torch.empty_like(sent)
        times = []
        for _ in range(_REPEATS + 1):
            dist.barrier()
            wait(device)
            begin = time.perf_counter()
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, sent, (rank + 1) % world),
                    dist.P2POp(dist.irecv, received, (rank - 1) % world),
                ]
            )
            for work in works:
                work.wait()
            wait(device)
            times.append(time.perf_counter() - begin)
        slowest = torch.tensor(sorted(times[1:])[_REPEATS // 2], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        points.append([size, float(f"{slowest.item():.4g}")])
    if len(points) > 1 and points[-1][1] <= points[-2][1]:
        raise UserError(
            f"bench rates: {points[-1][0]} bytes between processes took no longer than {points[-2][0]}, so nothing was "
            "learnt; run it again while nothing else uses the machine."
        )
    return points


def run(device: torch.device, options: RatesOptions, say: Say) -> Path:
    """Measure and write. Collective; the first process times kernels and writes."""
    gpu, first = device.type == "cuda", dist.get_rank() == 0
    sizes = ON_GPUS if gpu else ON_CPUS
    link = measure_link(sizes.messages, device)
    told = provenance(device)
    path = options.out or own_path(told.gpu)
    if first:
        say(f"link: {link}")
        rater = Rater(sizes, device, "auto" if gpu else "reference", options.seconds, say)
        head_dims = options.head_dim or ((128,) if gpu else (16,))
        memory = torch.cuda.get_device_properties(device).total_memory / GIB if gpu else 0.0
        source = f"mtraining bench rates, {told.date}, commit {told.commit}, torch {told.torch}"
        found = {
            "gpu": told.gpu,
            "memory_gib": round(memory, 1),
            "sources": {"all": source},
            **measure_rates(rater, head_dims),
            "intra": link,
            "inter": None,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(found, indent=1) + "\n")
        say(f"wrote {path}")
    # Nobody leaves while the first process still measures.
    dist.barrier()
    return path


def bench(options: RatesOptions) -> int:
    """The whole command, as one of torchrun's processes or as what starts them.

    Raises:
        UserError: bad options.
    """
    gpu = on_gpu(options.device)
    if not under_torchrun():
        return start("mtraining.bench.rates", arguments(options), process_count(options.nproc, gpu), gpu)
    device = take_device(gpu)
    dist.init_process_group(backend_for(device))
    run(device, options, lambda text: print(text, flush=True))
    dist.destroy_process_group()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the command line's packages; 2 for bad input."""
    try:
        return bench(parse(RatesOptions, "python -m mtraining.bench.rates", __doc__, argv)[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
