"""What packed documents cost: whole training steps on one GPU, beside one document of full length.

    python benchmarks/packed_steps.py --out CSV                                  (an NVIDIA GPU; 128K tokens, 4 layers)
    python benchmarks/packed_steps.py --out CSV --shape tiny --seq-len 512 --density 0.5                    (on a CPU)

Random weights of a Qwen2.5-3B shape, a prescribed index, the trainer's own step. Every case has the same tokens:

* ``one document``: it fills the sequence.
* ``packed``: documents of many lengths that begin at any token.
* ``packed, whole blocks``: the same lengths rounded to blocks, so that no tile needs a mask.

Packed ones run twice. ``density``: the same share of what a query may attend to, so they compute less. ``area``: a
denser index, which computes as many tiles as that of one document: what is left is the cost of boundaries.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mtraining.bench.record import appended, provenance
from mtraining.bench.timing import wait
from mtraining.bench.train.cases import SHAPES, TrainCase
from mtraining.bench.train.model import (
    batches,
    build_model,
    compute_dtype,
    process_for,
    random_sequences,
    stepper,
)
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.model import parallelize
from mtraining.pattern import SequenceShard, ToeplitzRandom
from mtraining.train.mesh import Process
from mtraining.train.step import Batch

FIELDS = (
    "date commit gpu torch triton model layers seq_len fused case equal documents density area step_seconds "
    "tokens_per_second relative"
).split()


def document_lengths(seq_len: int, block: int, aligned: bool) -> list[int]:
    """Documents that fill a sequence: log-normal around a sixteenth of it, from a few tokens to half of it."""
    generator = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < seq_len:
        drawn = int(np.clip(generator.lognormal(np.log(seq_len / 16), 1.2), 16, seq_len // 2))
        drawn = max(block, round(drawn / block) * block) if aligned else drawn
        lengths.append(min(drawn, seq_len - sum(lengths)))
    return lengths


def starts_of(lengths: Sequence[int]) -> Tensor:
    """int32 (1, tokens)."""
    begins = np.cumsum(lengths) - lengths
    return torch.from_numpy(np.repeat(begins, lengths).astype(np.int32))[None]


def prescribed(pattern: ToeplitzRandom, heads: int, seq_len: int, starts: Tensor | None) -> SparseIndex:
    """The index of a pattern that looks at no query, on the CPU."""
    shape = torch.empty(1, seq_len, heads, 0)
    index = replace(pattern, with_estimation=False).estimate(shape, shape, SequenceShard.whole(seq_len), 1.0)
    return index if starts is None else replace(index, starts=starts)


def with_area(
    pattern: ToeplitzRandom, heads: int, seq_len: int, starts: Tensor, area: float
) -> ToeplitzRandom:
    """The pattern at the density whose computed area comes nearest to ``area``, by bisection."""
    low, high = pattern.density, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        found = float(
            prescribed(replace(pattern, density=middle), heads, seq_len, starts).computed_area().mean()
        )
        low, high = (middle, high) if found < area else (low, middle)
    return replace(pattern, density=high)


def packed_batches(case: TrainCase, process: Process, starts: Tensor | None) -> Iterator[Batch]:
    """The same random tokens over and over; of packed documents, with their starts, positions and labels."""
    batch = dict(next(batches(case, random_sequences(case.shape.vocab, case.seq_len), process)))
    if starts is not None:
        place = torch.arange(case.seq_len) - starts
        last = torch.cat([place[:, 1:] == 0, torch.ones(1, 1, dtype=torch.bool)], 1)
        batch |= {
            "starts": starts,
            "position_ids": place.long(),
            "labels": batch["labels"].masked_fill(last, -100),
        }
        if process.device.type == "cuda":
            batch = {name: x.pin_memory() for name, x in batch.items()}
    while True:
        yield batch


def step_seconds(
    case: TrainCase, pattern: ToeplitzRandom, process: Process, starts: Tensor | None, steps: int
) -> float:
    """Median of ``steps`` steps, after two that are not timed."""
    model = parallelize(
        build_model(case.shape, case.seq_len, case.layers, process.device),
        process.mesh,
        pattern=pattern,
        layout=build_layout(case.layout, case.shape.block_size),
        recompute=cast(Any, case.recompute),
        param_dtype=compute_dtype(process.device),
        fused=cast(Any, case.fused),
    )
    step, data = stepper(case, model, process), packed_batches(case, process, starts)
    taken = []
    for number in range(steps + 2):
        wait(process.device)
        begin = time.perf_counter()
        step.run(data, number)
        wait(process.device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="CSV to add to")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=131072)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--fused", default="none")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    shape, seq_len = SHAPES[options.shape], options.seq_len
    case = TrainCase(
        shape,
        seq_len,
        options.density,
        "striped",
        "flat",
        "keep_attention",
        options.layers,
        fused=options.fused,
    )
    process, told = process_for(case, device, 0, 1), provenance(device)
    pattern = cast(ToeplitzRandom, case.pattern())
    whole = float(prescribed(pattern, shape.heads, seq_len, None).computed_area().mean())
    causal = seq_len * (seq_len + shape.block_size) / 2
    plain = None
    with appended(options.out, FIELDS) as write:
        for name, aligned in (("one document", None), ("packed", False), ("packed, whole blocks", True)):
            lengths = [seq_len] if aligned is None else document_lengths(seq_len, shape.block_size, aligned)
            starts = None if aligned is None else starts_of(lengths)
            for equal in ("density", "area"):
                chosen = pattern
                if starts is None and equal == "area":
                    continue
                if starts is not None and equal == "area":
                    chosen = with_area(pattern, shape.heads, seq_len, starts, whole)
                index = prescribed(chosen, shape.heads, seq_len, starts)
                seconds = step_seconds(case, chosen, process, starts, options.steps)
                plain = seconds if plain is None else plain
                density, area = float(index.density().mean()), float(index.computed_area().mean()) / causal
                numbers = [f"{density:.4f}", f"{area:.4f}", f"{seconds:.5f}", f"{seq_len / seconds:.1f}"]
                numbers.append(f"{plain / seconds:.4f}")
                head = [*astuple(told), shape.name, options.layers, seq_len, options.fused]
                write([*head, name, equal, len(lengths), *numbers])
                print(
                    f"{name:20} equal {equal:8} {len(lengths):4} documents, density {density:.4f}, area {area:.4f}: "
                    f"{seconds:.4f} s, {plain / seconds:.3f} of one document's speed",
                    flush=True,
                )


if __name__ == "__main__":
    main()
