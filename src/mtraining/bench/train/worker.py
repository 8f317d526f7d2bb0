"""What each rank of `mtraining bench train` does: gate, build, warm up, time; case after case."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.distributed as dist

from mtraining.bench.attention.gate import GateError
from mtraining.bench.record import Provenance
from mtraining.bench.timing import wait
from mtraining.bench.train.cases import TrainCase
from mtraining.bench.train.gate import check_step, shortened
from mtraining.bench.train.model import (
    batches,
    build_model,
    compute_dtype,
    parallel,
    process_for,
    random_sequences,
    stepper,
)
from mtraining.bench.train.progress import Effort, Progress
from mtraining.bench.train.record import TrainRow, comparable, dense_seconds
from mtraining.errors import UserError, first_line
from mtraining.kernel import Backend, select_backend
from mtraining.kernel.measured_tiles import tiles_in_use
from mtraining.layout import build_layout
from mtraining.model.allocator import shortages
from mtraining.pattern import VerticalSlash
from mtraining.predict.memory import GIB, Prediction, Workload, predict
from mtraining.predict.recompute import policies_text
from mtraining.ring import Ring, Timeline
from mtraining.ring.plan import make_plan
from mtraining.train.mesh import Process
from mtraining.train.recompute import choose_together

Say = Callable[[str], None]


def run_cases(
    cases: Sequence[TrainCase],
    effort: Effort,
    device: torch.device,
    told: Provenance,
    progress: Progress,
    keep: Callable[[TrainRow], object] = lambda row: None,
    say: Say = print,
) -> None:
    """Run the cases that ``progress`` does not know yet. Collective; rank 0 keeps the rows and does the talking.

    A case that is refused or wrong is noted and the rest goes on. One that fails (out of memory, a lost peer) is noted
    and leaves by its exception, since other ranks may be waiting in the middle of the step; a rank that is alone goes
    on after running out of memory.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    tell = progress.tell if rank == 0 else lambda **event: None
    say = say if rank == 0 else lambda text: None
    passed: dict[TrainCase, str] = {}
    for number, case in enumerate(cases):
        if number in progress.ended:
            continue
        if number in progress.begun:  # by processes that are gone
            tell(note=f"{case.describe()}: ended the processes", end=number)
            continue
        tell(begin=number)
        say(case.describe())
        try:
            process = process_for(case, device, rank, world)
            if case.recompute == "auto":
                choice, line = choose_together(_work(case, world, device), device, process.gather_objects)
                case = replace(case, policies=None if choice is None else choice.policies)
                say(f"  {line}")
            if device.type == "cuda":  # a run out of memory costs all processes a new start
                memory = torch.cuda.get_device_properties(device).total_memory
                _predicted(case, world, device).check(1.1 * memory)  # a prediction may be that far off
            key = shortened(case, world)
            if key not in passed:
                passed[key] = _gate(case, process)
            if passed[key]:
                tell(failure=f"{case.describe()}: {passed[key]}")
                say(f"  WRONG, not timed: {passed[key]}")
            else:
                row = _with_dense(_measure(case, effort, process, told), progress.rows)
                tell(row=asdict(row))
                if rank == 0:
                    keep(row)
                say(f"  {row.step_seconds:.3g} s a step, {row.tokens_per_second:,.0f} tokens/s")
        except UserError as refusal:
            tell(note=f"{case.describe()}: not run: {refusal}")
            say(f"  not run: {refusal}")
        except Exception as error:
            full = isinstance(error, torch.OutOfMemoryError)
            reason = (
                f"{'out of memory' if full else type(error).__name__} on rank {rank}: {first_line(error)}"
            )
            progress.tell(note=f"{case.describe()}: {reason}", end=number)
            if world > 1 or not full:
                raise
            say(f"  {reason}")
        tell(end=number)
        _free(device)


def _gate(case: TrainCase, process: Process) -> str:
    """Empty, or what is wrong."""
    try:
        check_step(case, process)
    except GateError as wrong:
        return str(wrong)
    finally:
        _free(process.device)
    return ""


@dataclass(frozen=True)
class _Timed:
    """``seconds`` a step, median over ``steps``; bytes, and shortages a step, of the rank with most, on GPUs only."""

    steps: int
    seconds: float
    exposed: float
    peak: float | None = None
    reserved: float | None = None
    shortages: float | None = None


def _predicted(case: TrainCase, world: int, device: torch.device) -> Prediction:
    """The memory of each rank."""
    recompute, offload = case.keeps
    return predict(replace(_work(case, world, device), recompute=recompute, offload=offload))


def _work(case: TrainCase, world: int, device: torch.device) -> Workload:
    outer = case.outer(world)
    return Workload(
        build_model(case.shape, case.seq_len, case.layers, torch.device("meta")),
        world=world,
        ring=(outer, world // outer),
        seq_len=case.seq_len,
        batch=1,
        accumulation=1,
        patterns=[case.pattern()],
        layout=build_layout(case.layout, case.shape.block_size),
        recompute=case.recompute,
        offload=case.offload,
        fused=case.fused,
        compute=compute_dtype(device),
        float8=case.float8,
        optimizer_state=case.optimizer_state,
    )


def _time(case: TrainCase, effort: Effort, process: Process) -> _Timed:
    device = process.device
    model = parallel(case, build_model(case.shape, case.seq_len, case.layers, device), process)
    step = stepper(case, model, process)
    data = batches(case, random_sequences(case.shape.vocab, case.seq_len), process)
    _free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(effort.warmup):
        step.run(data, number)
    taken: list[float] = []
    before = shortages(device)
    with Timeline() as timeline:
        while not taken or (len(taken) < effort.steps and sum(taken) + taken[-1] <= effort.seconds):
            taken.append(_slowest(process, partial(step.run, data, effort.warmup + len(taken))))
    found = _Timed(len(taken), statistics.median(taken), max(process.gather(timeline.exposed_fraction)))
    if device.type != "cuda":
        return found
    return replace(
        found,
        peak=max(process.gather(torch.cuda.max_memory_allocated(device))),
        reserved=max(process.gather(torch.cuda.max_memory_reserved(device))),
        shortages=max(process.gather((shortages(device) - before) / len(taken))),
    )


def _slowest(process: Process, run: Callable[[], object]) -> float:
    """Seconds that ``run`` takes on the slowest rank, from a common start to the end of its work on the device."""
    process.sum(torch.zeros(1, device=process.device))
    wait(process.device)
    start = time.perf_counter()
    run()
    wait(process.device)
    return max(process.gather(time.perf_counter() - start))


def _measure(case: TrainCase, effort: Effort, process: Process, told: Provenance) -> TrainRow:
    timed = _time(case, effort, process)
    _free(process.device)
    return TrainRow(
        date=told.date,
        commit=told.commit,
        gpu=told.gpu,
        gpus=process.world,
        torch=told.torch,
        model=case.shape.name,
        layers=case.layers,
        seq_len=case.seq_len,
        density=_density(case, process.device),
        pattern=case.pattern().name,
        layout=case.layout,
        ring=case.ring,
        recompute=case.recompute,
        kept=policies_text(case.policies) if case.policies else "",
        kernel=_backend(case, process.device).name,
        fused=case.fused,
        offload=case.offload,
        float8=case.float8,
        optimizer_state=case.optimizer_state,
        steps=timed.steps,
        step_seconds=timed.seconds,
        tokens_per_second=case.seq_len / timed.seconds,
        dense_step_seconds=None,
        speedup=None,
        peak_gib=None if timed.peak is None else timed.peak / GIB,
        predicted_gib=_predicted(case, process.world, process.device).peak / GIB,
        reserved_gib=None if timed.reserved is None else timed.reserved / GIB,
        shortages=timed.shortages,
        ring_exposed_fraction=timed.exposed,
        estimate_seconds=None if case.density is None else _estimate(case, process),
        tiles=tiles_in_use(process.device, compute_dtype(process.device), case.shape.head_dim),
    )


def _with_dense(row: TrainRow, rows: Sequence[TrainRow]) -> TrainRow:
    dense = row.step_seconds if row.pattern == "dense" else dense_seconds(rows, comparable(row))
    return replace(row, dense_step_seconds=dense, speedup=dense / row.step_seconds if dense else None)


def _density(case: TrainCase, device: torch.device) -> float:
    """Of the prescribed index: computed area over causal tiles."""
    if case.density is None:
        return 1.0
    ring = Ring.over(None)
    shard = make_plan(ring, build_layout("contiguous", 1), case.seq_len, case.shape.block_size, device)
    heads = torch.empty(1, 1, case.shape.heads, 1, device=device)
    whole = shard.shard(_backend(case, device))
    return float(case.pattern(estimate=False).estimate(heads, heads, whole, 1.0).cost().mean())


def _backend(case: TrainCase, device: torch.device) -> Backend:
    return select_backend(case.kernel, device, compute_dtype(device), case.shape.head_dim)


def _estimate(case: TrainCase, process: Process) -> float:
    """Seconds of the index estimates of one step, one a layer: the median of three, on random queries and keys."""
    shape, device = case.shape, process.device
    dims = tuple(name for name in process.mesh.mesh_dim_names or () if name != "dp")
    layout = build_layout(case.layout, shape.block_size)
    plan = make_plan(Ring.over(process.mesh[dims]), layout, case.seq_len, shape.block_size, device)
    shard, dtype = plan.shard(_backend(case, device)), compute_dtype(device)
    q, k = (
        torch.randn(1, case.seq_len // process.world, heads, shape.head_dim, device=device, dtype=dtype)
        for heads in (shape.heads, shape.kv_heads)
    )
    pattern, scale = VerticalSlash(block_size=shape.block_size), shape.head_dim**-0.5
    taken = [_slowest(process, lambda: pattern.estimate(q, k, shard, scale)) for _ in range(4)]
    return case.layers * statistics.median(taken[1:])


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
