"""Where one training step's time goes, component by component, on each GPU of one machine.

torchrun --nproc-per-node 4 benchmarks/step_profile.py --seq-len 512K --density 0.05 [--layers 4] [--out FOLDER]

The step is the one that `mtraining bench train` times: random weights, a prescribed index, estimation made and dropped.
One step is recorded by torch.profiler after the warm-up; each kernel belongs to what launched it. Components add up to
the kernels' time; transfers run beside compute, so "not hidden" is the part of the step in which nothing else ran.
"Rate" is that of all matmuls outside attention, recompute included, over the time of everything outside attention, as
a share of an 8192^3 product in the same process.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from mtraining.bench.processes import leave
from mtraining.bench.record import code_version
from mtraining.bench.train.cases import SHAPES, TrainCase, parse_tokens
from mtraining.bench.train.model import batches, build_model, parallel, process_for, random_sequences, stepper
from mtraining.model import loss
from mtraining.pattern import Pattern
from mtraining.ring import attention, prioritise_transfers
from mtraining.train.mesh import backend_for

MATMUL = ("gemm", "nvjet", "cutlass", "xmma", "cublas", "aten::mm", "aten::addmm", "aten::linear")
ATTENTION = ("estimation", "attention forward", "attention backward", "ring transfers")
TRANSFERS = ("ring transfers", "FSDP transfers", "offload and batch copies")
COLUMNS = (
    "date commit gpu gpus torch model layers seq_len density pattern ring recompute fused offload component ms share"
).split()


def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` inside a named range of the profiler."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"part:{name}"):
            return function(*args, **kwargs)

    return call


def mark(pattern: type[Pattern]) -> None:
    """Name the ranges of this process."""
    pattern.estimate = marked("estimation", pattern.estimate)  # type: ignore[method-assign]
    attention.ring_forward = marked("attention forward", attention.ring_forward)
    attention.ring_backward = marked("attention backward", attention.ring_backward)
    function = loss._ChunkedCrossEntropy
    function.forward = staticmethod(marked("loss", function.forward))  # type: ignore[method-assign]
    function.backward = staticmethod(marked("loss", function.backward))  # type: ignore[method-assign]


def component(kernel: str, ranges: list[str]) -> str:
    """Which part of the step a kernel belongs to, by its name and by the ranges around its launch, outermost first."""
    part = next((name.removeprefix("part:") for name in reversed(ranges) if name.startswith("part:")), None)
    if "nccl" in kernel.lower() or kernel.startswith("gloo"):
        return "ring transfers" if part in ATTENTION else "FSDP transfers"
    if part is not None:
        return part
    if any(name.startswith("Optimizer.step") for name in ranges):
        return "optimizer"
    if any(name.startswith("FSDP::") for name in ranges):
        return "FSDP copies"
    if "HtoD" in kernel or "DtoH" in kernel:
        return "offload and batch copies"
    if any(word in kernel.lower() for word in MATMUL):
        return "matmuls of layers"
    return "norms, rotary, gated MLP, sums"


@dataclass
class Span:
    """A host event of a trace: an operator, a range, or a launch. Microseconds."""

    event: dict[str, Any]
    ranges: list[str]
    own: float  # less its children


def host_spans(events: list[dict[str, Any]]) -> list[Span]:
    """Every host event with the names of the events around it on its thread."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        transfer = event["name"].startswith(("gloo:", "nccl:"))  # lasts beyond the call that began it
        if event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver") and not transfer:
            threads[event["pid"], event["tid"]].append(event)
    spans = []
    for thread in threads.values():
        around: list[Span] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while around and around[-1].event["ts"] + around[-1].event["dur"] <= event["ts"]:
                around.pop()
            if around:
                around[-1].own -= event["dur"]
            around.append(Span(event, [span.event["name"] for span in around], event["dur"]))
            spans.append(around[-1])
    return spans


def trace_events(recorded: profile) -> list[dict[str, Any]]:
    """What the profiler saw, as events with a name, a category, a start and a duration."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]


def pieces(events: list[dict[str, Any]], on_gpu: bool) -> Iterator[tuple[str, float, float]]:
    """(component, start, end) of every kernel, in microseconds; on a CPU, of every operator less its children."""
    spans = host_spans(events)
    if not on_gpu:
        for span in spans:
            if span.event["cat"] == "cpu_op":
                start = span.event["ts"]
                yield component(span.event["name"], span.ranges), start, start + span.own
        return
    launches = {
        span.event["args"]["correlation"]: span.ranges
        for span in spans
        if "correlation" in span.event.get("args", {})
    }
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            ranges = launches.get(event["args"].get("correlation"), [])
            yield component(event["name"], ranges), event["ts"], event["ts"] + event["dur"]


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length covered by at least one span."""
    covered, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return covered


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of one 8192^3 product (512^3 on a CPU), median of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        wait(device)
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        seconds.append((time.perf_counter() - start) / 10)
    return 2 * size**3 / statistics.median(seconds[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def outside_flops(case: TrainCase, tokens: int) -> float:
    """Matmuls made outside attention for ``tokens`` tokens: forward, backward (twice that), and the layers' recompute.

    Eager recompute ends where nothing more is kept, before the last projection; a compiled layer runs to its end.
    """
    shape, kv = case.shape, case.shape.hidden // case.shape.heads * case.shape.kv_heads
    layer = 2 * shape.hidden * (shape.hidden + kv) + 3 * shape.hidden * shape.mlp
    again = layer - (0 if case.fused == "compile" else shape.hidden * shape.mlp)
    passes = 3 * layer + (0 if case.recompute == "none" else again)
    return 2.0 * tokens * (case.layers * passes + 3 * shape.vocab * shape.hidden)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-3b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-len", type=parse_tokens, default=131072)
    parser.add_argument("--density", type=float, default=0.2, help="0 is dense attention, on zigzag")
    parser.add_argument("--ring", default="flat")
    parser.add_argument("--recompute", default="keep_attention")
    parser.add_argument("--fused", default="none")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--kernel", default="auto")
    parser.add_argument(
        "--steps", type=int, default=3, help="timed without the profiler, after two of warm-up"
    )
    parser.add_argument("--out", type=Path, help="folder of a CSV to add to")
    return parser.parse_args()


def main() -> int:
    options = parse()
    on_gpu, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        prioritise_transfers()
    alone: dict[str, Any] = (
        {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    )
    dist.init_process_group(backend_for(device), **alone)
    rank, world, shape = dist.get_rank(), dist.get_world_size(), SHAPES[options.model]
    case = TrainCase(
        shape=shape,
        seq_len=options.seq_len,
        density=options.density or None,
        layout="striped" if options.density else "zigzag",
        ring=options.ring,
        recompute=options.recompute,
        layers=options.layers,
        kernel=options.kernel,
        fused=options.fused,
        offload=options.offload,
    )
    rate = matmul_rate(device)
    process = process_for(case, device, rank, world)
    model = parallel(case, build_model(shape, case.seq_len, case.layers, device), process)
    mark(type(case.pattern()))
    run = stepper(case, model, process)
    data = batches(case, random_sequences(shape.vocab, case.seq_len), process)
    seconds = []
    for step in range(2 + options.steps):
        wait(device)
        start = time.perf_counter()
        run.run(data, step)
        seconds.append(time.perf_counter() - start)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        run.run(data, 2 + options.steps)
        wait(device)
    found = list(pieces(trace_events(recorded), on_gpu))
    if rank == 0:
        rows = summary(found, statistics.median(seconds[2:]) * 1e3, on_gpu)
        rows["peak GiB"] = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else 0.0
        outside = sum(ms for name, ms in rows.items() if name in OUTSIDE) / 1e3
        flops = outside_flops(case, case.seq_len // world)
        rows["rate outside attention"] = flops / outside / rate if outside else 0.0
        report(rows, options, case, device, world)
    dist.destroy_process_group()
    return 0


OUTSIDE = ("matmuls of layers", "norms, rotary, gated MLP, sums", "loss", "optimizer", "FSDP copies")


def summary(found: list[tuple[str, float, float]], step_ms: float, on_gpu: bool) -> dict[str, float]:
    """Milliseconds by component, largest first; then what no compute hides, idle time, and the step itself."""
    total: dict[str, float] = defaultdict(float)
    for name, start, end in found:
        total[name] += (end - start) / 1e3
    rows = dict(sorted(total.items(), key=lambda item: -item[1]))
    if on_gpu and found:
        everything = union((start, end) for _, start, end in found) / 1e3
        compute = union((start, end) for name, start, end in found if name not in TRANSFERS) / 1e3
        span = (max(end for *_, end in found) - min(start for _, start, _ in found)) / 1e3
        rows |= {
            "transfers not hidden": everything - compute,
            "idle": span - everything,
            "profiled step": span,
        }
    return rows | {"step": step_ms}


def report(
    rows: dict[str, float], options: argparse.Namespace, case: TrainCase, device: torch.device, world: int
) -> None:
    print(f"{world} x {case.describe()}, rank 0")
    for name, value in rows.items():
        share = f"{value / rows['step']:7.1%}" if name not in ("peak GiB", "rate outside attention") else ""
        print(f"{name:32} {value:12.3f} {share}")
    if options.out is None:
        return
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    pattern = "dense" if case.density is None else "toeplitz_random"
    head = [
        date.today(),
        code_version(),
        gpu,
        world,
        torch.__version__,
        case.shape.name,
        case.layers,
        case.seq_len,
    ]
    head += [case.density or 1.0, pattern, case.ring, case.recompute, case.fused, case.offload]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"profile-{gpu.split()[-1].lower()}-{date.today()}.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for name, value in rows.items():
            writer.writerow([*head, name, round(value, 3), round(value / rows["step"], 4)])
    print(f"wrote {path}")


if __name__ == "__main__":
    leave(main())
