"""What an estimate costs: vertical_slash by probe, phase by phase, and the patterns that are plain PyTorch.

    python benchmarks/estimate_cost.py --tokens 32768 131072 524288

One process with the whole sequence, default options where none are named, random queries and keys. Before anything is
timed, every pattern's index on this device (bf16, this device's kernels) is compared with the reference's on the CPU
(fp32) at a small size; choices at a threshold may fall differently, so up to one entry in a hundred may differ.

``ms`` is the median of repeated runs queued behind one another; ``mib`` what is allocated at the peak beside queries
and keys. Phases of vertical_slash: ``probe_lse`` and ``probe_mass`` score the probe, ``select`` spends the budget.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor

from mtraining.bench.record import appended, provenance
from mtraining.bench.timing import measure
from mtraining.kernel import Backend, select_backend
from mtraining.pattern import Pattern, SequenceShard, VerticalSlash, build_pattern
from mtraining.pattern.probe import gather_queries, probe_positions

FIELDS = "date commit gpu torch triton tokens q_heads kv_heads head_dim pattern phase ms mib".split()
SMALL = 2048


def patterns(block_size: int = 128) -> dict[str, Pattern]:
    """What is measured, by name."""

    def build(name: str, **options: object) -> Pattern:
        return build_pattern(name, block_size=block_size, **options)

    by_block = {"slash_by": "block", "top_p": 0.95}
    chunk = 32 * block_size
    return {
        "vertical_slash, last 64, token (the paper)": build("vertical_slash"),
        "vertical_slash, spread 64, block": build("vertical_slash", probe_at="spread", **by_block),
        "vertical_slash, spread 256, block (the recipes)": build(
            "vertical_slash", probe=256, probe_at="spread", **by_block
        ),
        "vertical_slash, mixed 64, block": build("vertical_slash", probe_at="mixed", **by_block),
        "a_shape": build("a_shape"),
        "moba": build("moba", chunk=chunk),
        "union of moba and a_shape": build("union", patterns=(build("moba", chunk=chunk), build("a_shape"))),
        "flexprefill": build("flexprefill"),
        "flexprefill, refine 4": build("flexprefill", refine=4),
        "xattention": build("xattention", stride=max(1, block_size // 8)),
        "xattention, stride of a block": build("xattention", stride=block_size),
        "xattention, refine 4": build("xattention", stride=block_size, refine=4),
    }


def gate_pattern(pattern: Pattern) -> Pattern:
    """The pattern with budgets that leave enough out of a short random sequence for a comparison to mean something."""
    size = pattern.block_size
    narrow: dict[str, dict[str, object]] = {
        "a_shape": {"sinks": 40, "window": 2 * size},
        "moba": {"chunk": 2 * size, "top_k": 3},
        "flexprefill": {"gamma": 0.3},
        "xattention": {"threshold": 0.5},
    }
    if isinstance(pattern, VerticalSlash):
        budget = {"top_p": None, "top_k_columns": SMALL // 16}
        by_block = {"slash_by": "block", "slash_density": 0.2}
        spent = by_block if pattern.slash_by == "block" else {"top_k_slashes": size + 3, "window": size}
        probe = {"probe": pattern.probe, "probe_at": pattern.probe_at}
        return build_pattern("vertical_slash", block_size=size, **budget, **spent, **probe)
    if pattern.name == "union":
        members = tuple(gate_pattern(member) for member in pattern.members)  # type: ignore[attr-defined]
        return build_pattern("union", block_size=size, patterns=members)
    kept = {name: getattr(pattern, name) for name in ("stride", "refine") if hasattr(pattern, name)}
    return build_pattern(pattern.name, block_size=size, **kept, **narrow[pattern.name])


def inputs(
    tokens: int, heads: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """q (1, tokens, q_heads, head_dim), k (1, tokens, kv_heads, head_dim); some keys are loud."""
    generator = torch.Generator(device).manual_seed(0)
    q, k = (
        torch.randn(1, tokens, number, heads[2], generator=generator, device=device, dtype=dtype)
        for number in heads[:2]
    )
    k[:, ::37] *= 2
    return q, k


def shard_of(tokens: int, backend: Backend, device: torch.device) -> SequenceShard:
    return SequenceShard(torch.arange(tokens, device=device)[None], backend=backend)


def check(
    name: str, pattern: Pattern, heads: tuple[int, int, int], backend: Backend, device: torch.device, dtype: torch.dtype
) -> float:  # fmt: skip
    """Share of entries that differ from the reference's.

    Raises:
        SystemExit: more than one in a hundred, or a comparison of nothing.
    """
    pattern = gate_pattern(pattern)
    q, k = inputs(SMALL, heads, device, dtype)
    ours = pattern.estimate(q, k, shard_of(SMALL, backend, device), heads[2] ** -0.5).to_mask().cpu()
    whole = SequenceShard.whole(SMALL)
    truth = pattern.estimate(q.cpu().float(), k.cpu().float(), whole, heads[2] ** -0.5).to_mask()
    kept, differ = (int(x.count_nonzero()) / x.numel() for x in (truth, ours != truth))
    if not 0 < kept < 0.45 or differ > 0.01:
        raise SystemExit(
            f"{name}: wrong, nothing was timed: {differ:.2%} of entries differ, {kept:.1%} selected"
        )
    return differ


def phases(pattern: Pattern, q: Tensor, k: Tensor, shard: SequenceShard) -> dict[str, Callable[[], object]]:
    """What is timed: the whole estimate, and of vertical_slash its parts."""
    scale = q.shape[3] ** -0.5
    runs: dict[str, Callable[[], object]] = {"estimate": lambda: pattern.estimate(q, k, shard, scale)}
    if isinstance(pattern, VerticalSlash):
        backend = shard.backend
        at = probe_positions(pattern.probe, pattern.probe_at, shard.seq_len, q.device)
        probe = gather_queries(q, at, shard)
        lse = backend.probe_lse(probe, k, at, shard.positions, scale)
        scored = (probe, k, at, shard.positions, scale, lse, shard.seq_len, pattern.slash_size)
        mass = backend.probe_mass(*scored)
        runs |= {
            "probe_lse": lambda: backend.probe_lse(probe, k, at, shard.positions, scale),
            "probe_mass": lambda: backend.probe_mass(*scored),
            "select": lambda: pattern.select(*mass, backend),
        }
    return runs


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072, 524288])
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("Q", "KV", "DIM"))
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.2, help="of repetitions a timing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/estimate-cost.csv"))
    options = parser.parse_args(argv)
    device, heads = torch.device(options.device), tuple(options.heads)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backend = select_backend("triton" if device.type == "cuda" else "reference", device, dtype, heads[2])
    origin = astuple(provenance(device))
    print(f"{origin[2]}, kernel {backend.name}, {heads[0]}/{heads[1]} heads of {heads[2]}")
    measured = patterns(options.block_size)
    for name, pattern in measured.items():
        print(
            f"{name}: {check(name, pattern, heads, backend, device, dtype):.3%} of entries differ from the reference"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with appended(options.out, FIELDS) as write:
        for tokens in options.tokens:
            q, k = inputs(tokens, heads, device, dtype)
            shard = shard_of(tokens, backend, device)
            for name, pattern in measured.items():
                for phase, run in phases(pattern, q, k, shard).items():
                    held = torch.cuda.memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
                    timing = measure(run, device, options.seconds)
                    mib = "" if timing.peak_mib is None else f"{timing.peak_mib - held:.0f}"
                    write([*origin, tokens, *heads, name, phase, f"{timing.ms:.4g}", mib])
                    print(f"{tokens:7} {name:48} {phase:10} {timing.ms:9.3f} ms {mib:>6} MiB", flush=True)


if __name__ == "__main__":
    main()
