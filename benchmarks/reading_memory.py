"""Peak memory of reading and answering prompts on GPUs, beside what `mtraining.predict.reading` says beforehand.

torchrun --nproc-per-node 1 benchmarks/reading_memory.py --seq-len 64K 128K
torchrun --nproc-per-node 2 benchmarks/reading_memory.py --seq-len 256K 512K

The model has Qwen2.5-3B's shape and random weights. Each length is read sparsely and answered; as four prompts of a
quarter of it; densely (up to 128K tokens); and sparsely with every token's loss. The script fails where a prediction is
more than a tenth from what was measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from mtraining import use_expandable_segments
from mtraining.bench.processes import leave, take_device
from mtraining.bench.record import Provenance, provenance, write_csv
from mtraining.bench.train.cases import SHAPES, Shape, parse_tokens
from mtraining.bench.train.model import build_model, compute_dtype, random_sequences
from mtraining.generate import Generator
from mtraining.pattern import Dense, Pattern, VerticalSlash
from mtraining.predict.reading import ReadingWork, predict_reading
from mtraining.train.mesh import backend_for

GIB = 2**30
NEW_TOKENS = 8
DENSE_UP_TO = 128 * 1024  # tokens; longer dense prompts take minutes and no other memory
ALLOWED = 0.10


@dataclass(frozen=True)
class Row(Provenance):
    """One line of the CSV."""

    gpus: int
    model: str
    layers: int
    attention: str
    work: str
    prompts: int
    seq_len: int
    predicted_gib: float
    peak_gib: float


@dataclass(frozen=True)
class Case:
    """What is read at a time, and how."""

    attention: str
    lengths: tuple[int, ...]
    scored: bool = False

    def pattern(self, shape: Shape) -> Pattern:
        if self.attention == "dense":
            return Dense(block_size=shape.block_size)
        return VerticalSlash(
            block_size=shape.block_size, slash_by="block", slash_density=0.035, probe_at="spread"
        )

    @property
    def layout(self) -> str:
        return "zigzag" if self.attention == "dense" else "striped"


def cases(lengths: Sequence[int]) -> Iterator[Case]:
    for length in lengths:
        yield Case("sparse", (length,))
        yield Case("sparse", (length // 4,) * 4)
        yield Case("sparse", (length,), scored=True)
        if length <= DENSE_UP_TO:
            yield Case("dense", (length,))


def predicted(case: Case, shape: Shape, model: Any, generator: Generator) -> float:
    """GiB."""
    ring = generator.attention.ring
    work = ReadingWork(
        model, (ring.outer, ring.inner), case.lengths, 0 if case.scored else NEW_TOKENS, [case.pattern(shape)],
        generator.attention.layout, next(model.parameters()).dtype, case.scored,
    )  # fmt: skip
    return predict_reading(work).peak / GIB


def measured(case: Case, generator: Generator, tokens: list[int], device: torch.device) -> float:
    """Most that PyTorch had allocated on any rank, GiB; 0 on a CPU, which does not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if case.scored:
        generator.token_nll(tokens[: case.lengths[0]])
    else:
        generator.generate([tokens[:length] for length in case.lengths], NEW_TOKENS, eos=())
    peak = torch.tensor(
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0, device=device
    )
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return float(peak) / GIB


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-3b", choices=sorted(SHAPES))
    parser.add_argument("--seq-len", nargs="+", default=["64K"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    shape, lengths = SHAPES[args.model], [parse_tokens(text) for text in args.seq_len]
    layers = args.layers or shape.layers
    device = take_device(torch.cuda.is_available())
    dist.init_process_group(backend_for(device))
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("cp",))
    tokens = random_sequences(shape.vocab, max(lengths))[0, : max(lengths)].tolist()
    model = build_model(shape, max(lengths) + NEW_TOKENS, layers, device).eval()
    for parameter in model.parameters():  # and not its rotary frequencies
        parameter.data = parameter.data.to(compute_dtype(device))

    about = dataclasses.asdict(provenance(device)) | {"gpus": world, "model": shape.name, "layers": layers}
    whole: Any = model
    rows: list[Row] = []
    for case in cases(lengths):
        generator = Generator(
            whole, mesh=mesh if whole is model else None, pattern=case.pattern(shape), layout=case.layout
        )
        whole = generator.model
        expected = predicted(case, shape, model, generator)
        row = Row(
            **about, attention=case.attention, work="losses" if case.scored else "answer", prompts=len(case.lengths),
            seq_len=case.lengths[0], predicted_gib=expected, peak_gib=measured(case, generator, tokens, device),
        )  # fmt: skip
        rows.append(row)
        if rank == 0:
            what = f"{row.attention}, {row.work}, {row.prompts} x {row.seq_len} tokens on {world}"
            print(f"{what}: predicted {row.predicted_gib:.2f} GiB, measured {row.peak_gib:.2f}", flush=True)
    far = [row for row in rows if row.peak_gib and abs(row.predicted_gib / row.peak_gib - 1) > ALLOWED]
    if rank == 0:
        print(f"wrote {write_csv(rows, args.out, 'reading-memory')}", flush=True)
        for row in far:
            print(f"more than {ALLOWED:.0%} off: {row}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 1 if far else 0


if __name__ == "__main__":
    use_expandable_segments()
    leave(main())
