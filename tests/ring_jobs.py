"""Jobs of a process pool for rings of four ranks: over NCCL on however many GPUs there are, over gloo on CPUs.

A job returns what it found wrong in one sentence each, so that a wrong result costs no new start of the processes, and
a fingerprint of what every rank must have alike. ``python tests/ring_jobs.py`` runs all of them on what this machine
has, each with its time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distributed import ProcessPool, Worker
from mtraining.bench.attention.gate import TOLERANCE, GateError, poisoned_memory
from mtraining.bench.ring.gate import HEADS, RESULTS, Given, RingCase, gate_pattern
from mtraining.bench.train.cases import LAYOUTS, SHAPES, TrainCase
from mtraining.kernel import SparseIndex
from mtraining.pattern import build_pattern
from mtraining.ring import Ring, slow_links

WORLD = 4
RINGS = {"flat": (4,), "2x2": (2, 2)}
# dp, ring of each sequence, recompute
GRIDS = {"cp4": (1, "flat", "full"), "cp2x2": (1, "2x2", "keep_attention"), "dp2xcp2": (2, "flat", "none")}
NORM_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
Found = tuple[list[str], Any]


def case_for(
    worker: Worker, layout: str, heads: tuple[int, int, int], pattern: str = "vertical_slash"
) -> RingCase:
    """Of a size that the device answers at once."""
    on_gpu = worker.device.type == "cuda"
    block, tokens = (128, 16384) if on_gpu else (16, 512)
    return RingCase(
        gate_pattern(tokens, block)
        if pattern == "vertical_slash"
        else build_pattern(pattern, block_size=block, threshold=0.5),
        tokens,
        layout,
        heads,
        torch.bfloat16 if on_gpu else torch.float32,
        kernel="triton" if on_gpu else "reference",
    )


def mesh_for(worker: Worker, ring: str) -> Any:
    return worker.mesh(*((4, "cp") if ring == "flat" else (RINGS[ring], ("cp_outer", "cp_inner"))))


def far_off(errors: Sequence[float], allowed: float, where: str) -> list[str]:
    """Sentences on the errors that are too large, or NaN."""
    return [
        f"{where}: relative error of {name} {error:.1e}, at most {allowed:.0e} is allowed"
        for name, error in zip(RESULTS, errors, strict=True)
        if not error <= allowed
    ]


def differing(one: Sequence[Tensor], other: Sequence[Tensor], where: str) -> list[str]:
    """Sentences on the results that are not the same to the bit."""
    return [
        f"{where}: {name} has other bits, by up to {(a.float() - b.float()).abs().max():.1e}"
        for name, a, b in zip(RESULTS, one, other, strict=True)
        if not torch.equal(a, b)
    ]


def fingerprint(index: SparseIndex) -> str:
    held = (index.diagonals, index.columns, index.blocks)
    parts = (x.cpu().numpy().tobytes() for x in held if x is not None)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def attention(worker: Worker, ring: str, layout: str, heads: tuple[int, int, int], pattern: str) -> Found:
    """What one process gives under the index that the ring estimated; and the same bits twice."""
    case, mesh = case_for(worker, layout, heads, pattern), mesh_for(worker, ring)
    whole = case.inputs(worker.device)
    mine = case.local(whole, mesh)
    found, index = case.on_ring(mine, mesh)
    again, same = case.on_ring(mine, mesh)
    wrong = far_off(
        case.errors(found, case.alone(whole, index), mesh), TOLERANCE[case.dtype], "beside one process"
    )
    wrong += differing(again, found, "a second time")
    if fingerprint(same) != fingerprint(index):
        wrong.append("a second time: another index")
    density = float(index.density().mean())
    if not 0.02 < density < 0.9:
        wrong.append(f"an index of {density:.1%} of causal attention tests little")
    return wrong, fingerprint(index)


def bounded(worker: Worker, ring: str, layout: str, documents: int, window: int | None) -> Found:
    """Documents under an estimated index, or a window under a dense one, beside one process; the same bits twice."""
    case, mesh = case_for(worker, layout, HEADS[0]), mesh_for(worker, ring)
    if window is not None:
        case = replace(case, pattern=build_pattern("dense", block_size=case.pattern.block_size))
        window = window * case.pattern.block_size // 2
    case = replace(case, documents=documents, window=window)
    whole = case.inputs(worker.device)
    mine = case.local(whole, mesh)
    with poisoned_memory():
        found, index = case.on_ring(mine, mesh)
    again, _ = case.on_ring(mine, mesh)
    truth = case.alone(whole, index)
    wrong = far_off(case.errors(found, truth, mesh), TOLERANCE[case.dtype], "beside one process")
    return wrong + differing(again, found, "a second time"), fingerprint(index)


def rings_agree(worker: Worker, heads: tuple[int, int, int]) -> Found:
    """The two rings give the same but for rounding, under one index."""
    case = case_for(worker, "striped", heads)
    whole, flat, nested = case.inputs(worker.device), mesh_for(worker, "flat"), mesh_for(worker, "2x2")
    mine, index = case.on_ring(case.local(whole, flat), flat)
    given = replace(case, pattern=Given(index.block_size, index))
    theirs, _ = given.on_ring(case.local(whole, nested), nested)
    ring = Ring.over(flat)
    truth = [case.dealt.unshard(list(ring.all_gather(x.contiguous()))) for x in mine]
    return far_off(case.errors(theirs, truth, nested), TOLERANCE[case.dtype], "2x2 beside flat"), None


def behind_slow_links(worker: Worker, ring: str, seconds: float) -> Found:
    """Messages between two nodes of two that take their time do not change a bit."""
    case, mesh = case_for(worker, "striped", HEADS[0]), mesh_for(worker, ring)
    mine = case.local(case.inputs(worker.device), mesh)
    found, _ = case.on_ring(mine, mesh)
    with slow_links(node_size=2, delay_seconds=seconds):
        late, _ = case.on_ring(mine, mesh)
    return differing(late, found, "behind slow links"), None


def memory_again(worker: Worker, rounds: int, seconds: float) -> Found:
    """Calls one behind the other, of other tensors each, rings in turn; nothing is looked at before the last has begun.

    Every buffer that a call lets go of serves the next ones, which find it full of NaN, or fill it, while slow
    transfers may still have to read it.
    """
    cases = [
        replace(case_for(worker, layout, HEADS[0]), seed=seed)
        for seed, layout in zip(range(rounds), itertools.cycle(LAYOUTS), strict=False)
    ]
    meshes = [mesh_for(worker, ring) for _, ring in zip(cases, itertools.cycle(RINGS), strict=False)]
    inputs = [case.inputs(worker.device) for case in cases]
    parts = [case.local(whole, mesh) for case, whole, mesh in zip(cases, inputs, meshes, strict=True)]
    found = []
    for number, (case, mesh, mine) in enumerate(zip(cases, meshes, parts, strict=True)):
        links = slow_links(2, delay_seconds=seconds) if number % 3 else contextlib.nullcontext()
        with poisoned_memory(), links:
            found.append(case.on_ring(mine, mesh))
    wrong = []
    for number, (case, mesh, whole, (mine, index)) in enumerate(
        zip(cases, meshes, inputs, found, strict=True)
    ):
        errors = case.errors(mine, case.alone(whole, index), mesh)
        wrong += far_off(errors, TOLERANCE[case.dtype], f"call {number} ({case.layout})")
    return wrong, [fingerprint(index) for _, index in found]


def training_step(worker: Worker, grid: str) -> Found:
    """Loss and gradients of a step equal those of one process; the trainer's step, run twice, is made of them."""
    from mtraining.bench.train.gate import LOSS_TOLERANCE, VOCABULARY, check_step, gate_model, shortened
    from mtraining.bench.train.model import (
        batches,
        compute_dtype,
        parallel,
        process_for,
        random_sequences,
        stepper,
    )

    on_gpu = worker.device.type == "cuda"
    dp, ring, recompute = GRIDS[grid]
    case = shortened(
        TrainCase(SHAPES["qwen2.5-3b" if on_gpu else "tiny"], 32768, 0.4, "striped", ring, recompute, 2),
        WORLD,
    )
    process = process_for(case, worker.device, worker.rank, WORLD, dp)
    try:
        loss, norm = check_step(case, process, dp)
    except GateError as wrong:
        return [str(wrong)], None
    data = batches(case, random_sequences(VOCABULARY, case.seq_len, dp), process, dp)
    step = stepper(case, parallel(case, gate_model(case, worker.device), process), process)
    first, second = (step.run(data, number) for number in range(2))
    dtype, wrong_steps = compute_dtype(worker.device), []
    if not math.isclose(first.loss, loss, rel_tol=LOSS_TOLERANCE[dtype]):
        wrong_steps.append(f"loss {first.loss:.6f} of the step, {loss:.6f} of one process")
    if not math.isclose(first.grad_norm, norm, rel_tol=NORM_TOLERANCE[dtype]):
        wrong_steps.append(f"gradient norm {first.grad_norm:.6f} of the step, {norm:.6f} of one process")
    if not second.loss < first.loss:
        wrong_steps.append(f"loss {second.loss:.6f} after one step, {first.loss:.6f} before")
    return wrong_steps, (first.loss, first.grad_norm, second.loss, second.grad_norm)


# name -> job, its arguments
JOBS: dict[str, tuple[Callable[..., Found], dict[str, Any]]] = {
    **{
        f"attention, {ring}, {layout}, {heads[0]}/{heads[1]} heads of {heads[2]}": (
            attention,
            {"ring": ring, "layout": layout, "heads": heads, "pattern": "vertical_slash"},
        )
        for ring in RINGS
        for layout in LAYOUTS
        for heads in HEADS
    },
    **{
        f"attention, {ring}, block lists": (
            attention,
            {"ring": ring, "layout": "striped", "heads": HEADS[0], "pattern": "xattention"},
        )
        for ring in RINGS
    },
    **{
        f"{what}, {ring}, {layout}": (bounded, {"ring": ring, "layout": layout, **bounds})
        for what, bounds in (
            ("documents", {"documents": 9, "window": None}),
            ("window", {"documents": 0, "window": 5}),
            ("documents and window", {"documents": 3, "window": 21}),
        )
        for ring in RINGS
        for layout in LAYOUTS
    },
    **{f"rings agree, {heads[0]}/{heads[1]} heads": (rings_agree, {"heads": heads}) for heads in HEADS},
    **{f"behind slow links, {ring}": (behind_slow_links, {"ring": ring, "seconds": 0.02}) for ring in RINGS},
    "memory again": (memory_again, {"rounds": 12, "seconds": 0.005}),
    **{f"training step, {grid}": (training_step, {"grid": grid}) for grid in GRIDS},
}


def run_job(pool: ProcessPool, name: str) -> list[str]:
    """What is wrong, by rank."""
    job, options = JOBS[name]
    found = pool.run(job, WORLD, **options)
    wrong = [f"rank {rank}: {what}" for rank, (told, _) in enumerate(found) for what in told]
    odd = [rank for rank, (_, common) in enumerate(found) if common != found[0][1]]
    return wrong + ([f"ranks {odd} found something else than rank 0: {[c for _, c in found]}"] if odd else [])


def main() -> int:
    """Arguments: words that the names of the jobs must have one of; none for all of them. Ends where a rank is lost."""
    on_gpu, words = torch.cuda.is_available(), sys.argv[1:]
    pool, failed = ProcessPool(on_gpu), 0
    print(
        f"{WORLD} ranks on {torch.cuda.device_count()} GPUs" if on_gpu else f"{WORLD} ranks on CPUs",
        flush=True,
    )
    try:
        for name in (name for name in JOBS if not words or any(word in name for word in words)):
            start = time.perf_counter()
            wrong = run_job(pool, name)
            failed += bool(wrong)
            print(f"{time.perf_counter() - start:6.1f} s  {name}: {'; '.join(wrong) or 'right'}", flush=True)
    finally:
        pool.close()
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
