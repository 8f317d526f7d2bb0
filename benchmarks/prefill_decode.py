"""Seconds to read a prompt and tokens a second of its answer: dense and sparse on the ring, and transformers alone.

torchrun --nproc-per-node 2 benchmarks/prefill_decode.py --seq-len 512K [--plain-seq-len 64K] [--layers 36]

The model has Qwen2.5-3B's shape and random weights. Sparse prompts are read under the estimated pattern of the recipes.
Gate: logits after a prompt, read by the ring densely, equal those of transformers' own model on one process. Then each
case answers once to warm up and once to be timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
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
from mtraining.train.mesh import backend_for

GIB = 2**30
NEW_TOKENS = 33  # 32 of them are decoded, after the one that prefill gives


@dataclass(frozen=True)
class Row(Provenance):
    """One line of the CSV."""

    gpus: int
    model: str
    layers: int
    engine: str
    attention: str
    seq_len: int
    prefill_seconds: float
    decode_tokens_per_second: float
    density: float | None
    peak_gib: float


def sparse_pattern(shape: Shape) -> VerticalSlash:
    """That of recipes/qwen2.5-3b-512k.yaml; small blocks for the small shape."""
    return VerticalSlash(
        block_size=shape.block_size, top_p=0.95, max_columns=4096, slash_by="block", slash_density=0.035,
        probe_at="spread", probe=256,
    )  # fmt: skip


def plain_logits(model: Any, tokens: list[int], device: torch.device) -> torch.Tensor:
    """transformers' own logits after the last token, fp32 (vocabulary,)."""
    with torch.no_grad():
        return (
            model(torch.tensor([tokens], device=device), use_cache=False, logits_to_keep=1)
            .logits[0, -1]
            .float()
        )


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, in the 2-norm."""
    return float((found - exact).norm() / exact.norm())


def timed_plain(model: Any, tokens: list[int], device: torch.device) -> tuple[float, float]:
    """Prefill seconds and decoded tokens a second of transformers' generate, greedy."""
    prompt = torch.tensor([tokens], device=device)

    def seconds(new: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds(2)
    first = min(seconds(1), seconds(1))
    return first, (NEW_TOKENS - 1) / max(seconds(NEW_TOKENS) - first, 1e-9)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-3b", choices=sorted(SHAPES))
    parser.add_argument("--seq-len", default="512K")
    parser.add_argument("--plain-seq-len", default="64K", help="what transformers alone reads on one GPU")
    parser.add_argument("--gate-seq-len", default="4K")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    shape, length = SHAPES[args.model], parse_tokens(args.seq_len)
    layers = args.layers or shape.layers
    device = take_device(torch.cuda.is_available())
    dist.init_process_group(backend_for(device))
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("cp",))
    tokens = random_sequences(shape.vocab, length)[0, :length].tolist()

    model = build_model(shape, length + NEW_TOKENS, layers, device).eval()
    short = tokens[: parse_tokens(args.gate_seq_len)]
    exact = plain_logits(model, short, device)
    for parameter in model.parameters():  # and not its rotary frequencies
        parameter.data = parameter.data.to(compute_dtype(device))
    allowed = 2 * distance(plain_logits(model, short, device), exact) + 1e-4
    plain = timed_plain(model, tokens[: parse_tokens(args.plain_seq_len)], device) if rank == 0 else None
    plain_peak = peak(device)
    dist.barrier()

    cases: list[tuple[str, Pattern, str]] = [
        ("sparse", sparse_pattern(shape), "striped"), ("dense", Dense(block_size=shape.block_size), "zigzag"),
    ]  # fmt: skip
    whole: Any = model
    rows = []
    about = dataclasses.asdict(provenance(device)) | {"gpus": world, "model": shape.name, "layers": layers}
    for name, pattern, layout in cases:
        generator = Generator(whole, mesh=mesh if whole is model else None, pattern=pattern, layout=layout)
        whole = generator.model
        if name == "sparse":
            reader = Generator(whole, pattern=Dense(block_size=shape.block_size), layout="zigzag")
            error = distance(reader.prefill(short).float(), exact)
            if rank == 0:
                print(f"gate: {len(short)} tokens, {error:.2e} from fp32; allowed {allowed:.2e}", flush=True)
            if not error <= allowed:
                return 1
        generator.generate([tokens[: length // 16]], 4, eos=())  # kernels are compiled here
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        (found,) = generator.generate(
            [tokens], NEW_TOKENS, eos=(), recall_rows=0 if name == "sparse" else None
        )
        rate = (NEW_TOKENS - 1) / found.decode_seconds
        row = Row(**about, engine="mtraining", attention=name, seq_len=length, prefill_seconds=found.prefill_seconds,
                  decode_tokens_per_second=rate, density=found.density, peak_gib=peak(device))  # fmt: skip
        rows.append(row)
    if rank == 0 and plain is not None:
        about["gpus"] = 1
        rows.append(
            Row(**about, engine="transformers", attention="dense", seq_len=parse_tokens(args.plain_seq_len),
                prefill_seconds=plain[0], decode_tokens_per_second=plain[1], density=None, peak_gib=plain_peak)
        )  # fmt: skip
        for row in rows:
            case = f"{row.engine}, {row.attention}, {row.seq_len} tokens on {row.gpus}"
            speed = f"{row.prefill_seconds:.2f} s to read, then {row.decode_tokens_per_second:.1f} tokens/s"
            print(f"{case}: {speed}, {row.peak_gib:.1f} GiB, density {row.density}", flush=True)
        print(f"wrote {write_csv(rows, args.out, 'prefill-decode')}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def peak(device: torch.device) -> float:
    """Most memory that PyTorch had allocated since it was last reset, GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


if __name__ == "__main__":
    use_expandable_segments()
    leave(main())
