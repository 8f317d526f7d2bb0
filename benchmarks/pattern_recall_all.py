"""Recall against density of every pattern, and what its estimate costs.

    python benchmarks/pattern_recall_all.py --text NOVEL.txt

As ``pattern_recall.py``, which compares variants of vertical-slash: queries and keys of a real model under exact
attention, recall on random rows outside every probe (moba and xattention have no probe: they look at every query),
density as the computed area over that of dense attention. Each pattern is given a sweep of its own budget, at several
block sizes: 8K tokens have so few blocks of 128 that what a pattern always keeps is already more than 5 %.

A curve is one pattern at one block size. Its ``estimate_ms`` is the wall clock of a whole estimate of one layer at the
middle of its sweep, one thread of this CPU: the median over layers of the better of two.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path

import torch
from pattern_recall import frontier, read_ids, text_parser
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mtraining.bench.record import appended, code_version
from mtraining.evaluate.capture import visit_attention
from mtraining.evaluate.recall import attention_rows, held_out_rows, index_recall
from mtraining.kernel import ReferenceBackend, SparseIndex
from mtraining.model import ModelOptions, build_model
from mtraining.pattern import Pattern, SequenceShard, VerticalSlash, build_pattern
from mtraining.pattern.probe import column_and_slash_mass, probe_positions

TARGETS = (0.05, 0.10, 0.20)
BLOCK_SIZES = (128, 64, 32)
PROBES = (
    ("last", 64),
    ("spread", 256),
    ("last", max(BLOCK_SIZES)),
)  # vertical_slash's two, flexprefill's block
FIELDS = "date commit model text tokens layers rows pattern block_size options recall worst_decile density estimate_ms"
Curve = tuple[str, int]  # label, block size


def sweep(block_size: int) -> dict[str, list[Pattern]]:
    """Every pattern's budgets, from narrow to wide, by the label of its curve."""

    def build(name: str, **options: object) -> Pattern:
        return build_pattern(name, block_size=block_size, **options)

    columns = (32, 64, 128, 256, 512, 1024, 2048)
    spread = {"top_p": None, "probe": 256, "probe_at": "spread", "slash_by": "block"}
    chunks = [(block_size, k) for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)]
    chunks += [(4 * block_size, k) for k in (1, 2, 3, 4, 6, 8, 16)]
    moba = [build("moba", chunk=chunk, top_k=k) for chunk, k in chunks]
    sinks = build("a_shape", sinks=32, window=1)
    stride = max(4, block_size // 8)  # 16 for 128, as in the paper, and as many squares in smaller blocks
    return {
        "vertical_slash, last 64, token": [
            build("vertical_slash", top_p=None, top_k_columns=c, top_k_slashes=s)
            for c, s in product(columns, (100, 125, 150, 200, 250))
        ],
        "vertical_slash, spread 256, block": [
            build("vertical_slash", **spread, top_k_columns=c, slash_density=s)
            for c, s in product(columns, (0.01, 0.09, 0.13, 0.18, 0.24))
        ],
        "a_shape": [
            build("a_shape", sinks=s, window=w)
            for s, w in product((4, 32, 128, 512, 1024), (1, 129, 257, 513, 1025, 2049))
        ],
        "moba": moba,
        "moba + 32 sinks (union)": [build("union", patterns=(one, sinks)) for one in moba],
        "xattention": [
            build("xattention", stride=stride, threshold=t)
            for t in (0.02, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)
        ],
        "flexprefill": [
            build("flexprefill", gamma=g) for g in (0.02, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
        ],
    }


def indices(
    patterns: list[Pattern], q: Tensor, k: Tensor, scale: float, shard: SequenceShard
) -> list[SparseIndex]:
    """What each pattern selects; vertical-slash budgets share one probe and kind of slash, which they must agree on."""
    if not all(isinstance(pattern, VerticalSlash) for pattern in patterns):
        return [pattern.estimate(q, k, shard, scale) for pattern in patterns]
    probes = {(p.probe, p.probe_at, p.slash_size) for p in patterns if isinstance(p, VerticalSlash)}
    ((count, at, size),) = probes
    probe = probe_positions(count, at, shard.seq_len, q.device)
    mass = column_and_slash_mass(q, k, probe, shard, scale, size)
    found = []
    for pattern in patterns:
        assert isinstance(pattern, VerticalSlash)
        columns, diagonals = pattern.select(*mass, ReferenceBackend())
        found.append(SparseIndex(shard.seq_len, pattern.block_size, diagonals[None], columns[None].int()))
    return found


def seconds(call: Callable[[], object], repeats: int = 2) -> float:
    """Wall clock of the fastest of some calls."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)


def described(pattern: Pattern) -> str:
    """Its options, those that are not set and the block size left out."""
    options = {field.name: getattr(pattern, field.name) for field in fields(pattern)}
    members = options.pop("patterns", ())
    own = [f"{name}={value}" for name, value in options.items() if name != "block_size" and value is not None]
    return " ".join(own + [f"{member.name}({described(member)})" for member in members])


class Measured:
    """Recall and density of every budget of every curve, layer by layer."""

    def __init__(self, rows: Tensor, block_sizes: tuple[int, ...] = BLOCK_SIZES):
        self.rows = rows
        self.sweeps = {
            (label, size): patterns for size in block_sizes for label, patterns in sweep(size).items()
        }
        self.found: dict[tuple[Curve, Pattern], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.times: dict[Curve, list[float]] = defaultdict(list)
        self.dense: list[float] = []

    def layer(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Add one layer: q (1, tokens, q_heads, head_dim), k (1, tokens, kv_heads, head_dim)."""
        shard = SequenceShard.whole(q.shape[1])
        truth = torch.stack([attention_rows(q, k, self.rows, head, scale) for head in range(q.shape[2])])
        queries, keys = q.transpose(1, 2), k.transpose(1, 2)

        def dense() -> Tensor:
            return scaled_dot_product_attention(
                queries, keys, keys, is_causal=True, scale=scale, enable_gqa=True
            )

        self.dense.append(seconds(dense, 1))
        for curve, patterns in self.sweeps.items():
            middle = patterns[len(patterns) // 2]
            self.times[curve].append(seconds(partial(middle.estimate, q, k, shard, scale)))
            for pattern, index in zip(patterns, indices(patterns, q, k, scale, shard), strict=True):
                recall = index_recall(index, truth, self.rows)
                self.found[curve, pattern].append((recall.mean(1), index.cost()[0]))

    def points(self) -> dict[tuple[Curve, Pattern], tuple[float, float, float]]:
        """(density, recall, recall of the worst decile of heads), means over heads, rows and layers."""
        means = {}
        for key, layers in self.found.items():
            recall = torch.cat([recall for recall, _ in layers])
            density = torch.cat([density for _, density in layers]).mean().item()
            worst = recall.sort().values[: max(1, len(recall) // 10)].mean().item()
            means[key] = density, recall.mean().item(), worst
        return means


def main() -> None:
    parser = text_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pattern-recall-all.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    model, tokenizer = build_model(ModelOptions(init=options.model), seq_len=options.tokens)
    ids = read_ids(options, tokenizer, options.tokens)
    if ids.shape[1] < options.tokens:
        parser.error(f"the text has {ids.shape[1]} tokens, fewer than --tokens {options.tokens}")
    probes = [probe_positions(count, at, options.tokens, torch.device("cpu")) for at, count in PROBES]
    measured = Measured(held_out_rows(options.tokens, options.rows, torch.cat(probes)))

    def visit(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        if layer in options.layers:
            measured.layer(q, k, scale)

    del model.model.layers[max(options.layers) + 1 :]
    visit_attention(model, ids, visit)
    commit = code_version()
    source = [date.today(), commit, options.model, options.text.name, options.tokens]
    source += [" ".join(map(str, options.layers)), len(measured.rows)]
    cost = {curve: 1e3 * statistics.median(times) for curve, times in measured.times.items()}
    curves: dict[Curve, list[tuple[float, float, float]]] = defaultdict(list)
    with appended(options.out, FIELDS.split()) as write:
        for (curve, pattern), (density, recall, worst) in measured.points().items():
            curves[curve].append((density, recall, worst))
            numbers = (f"{recall:.4f}", f"{worst:.4f}", f"{density:.4f}", f"{cost[curve]:.1f}")
            write([*source, *curve, described(pattern), *numbers])
    print(f"dense attention: {1e3 * statistics.median(measured.dense):.0f} ms a layer")
    print("| pattern | block |", " | ".join(f"{target:.0%}" for target in TARGETS), "| cheapest | ms |")
    for (label, size), points in curves.items():
        cells = [frontier(points, target) for target in TARGETS]
        shown = [f"{cell[0]:.3f} ({cell[1]:.3f})" if cell else "-" for cell in cells]
        print(
            f"| {label} | {size} |", " | ".join(shown), f"| {min(points)[0]:.3f} | {cost[label, size]:.0f} |"
        )


if __name__ == "__main__":
    main()
