"""Cheaper forms of xattention's and flexprefill's estimates: what they lose in recall at equal density, and their work.

    python benchmarks/estimate_forms.py --text NOVEL.txt --tokens 16384

Queries and keys of a real model under exact attention, as ``pattern_recall_all.py`` has them; beyond the model's own
context with YaRN. Recall is the share of true attention that is kept on random rows. *Far* recall counts only keys at
least eight blocks away and outside the first block: a window reaches much of the rest whatever an estimate says.

Forms of the row-wise choice (xattention), each swept along ``threshold``:

* ``stride 16``: the paper's. ``stride 128``: one antidiagonal a pair of blocks.
* ``queries pooled``: a block's rows of squares are averaged before they are scored.
* ``64 rows of blocks``: some rows are scored; others take the sum of the nearest scored rows above and below, once
  along columns and once along slashes.
* ``means``: mean query times mean key of blocks. ``means of 2``, ``of 4``: of so many blocks, chosen together.
* ``refine 3``, ``4``, ``8``: the pattern's own option.

Forms of the choice over a whole map (flexprefill, every head query-aware), along ``gamma``: ``map``, ``map of 2``,
``map of 4`` blocks, and ``refine``. ``flexprefill`` has the paper's ``tau``. ``window`` is the first block and the
nearest ones.

``multiply_adds``: of q.k for one head, in millions; ``scores``: how many numbers they make, in millions.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from pattern_recall import read_ids, text_parser
from torch import Tensor

from mtraining.bench.record import appended, code_version
from mtraining.evaluate.capture import visit_attention
from mtraining.evaluate.recall import attention_rows, held_out_rows, index_recall
from mtraining.kernel import SparseIndex
from mtraining.model import ModelOptions, build_model
from mtraining.model.rope import RopeOptions
from mtraining.pattern import SequenceShard, build_pattern
from mtraining.pattern.base import Alone
from mtraining.pattern.blocks import grouped_products, heaviest_blocks
from mtraining.pattern.pooled import heaviest_pairs
from mtraining.pattern.refined import super_block
from mtraining.pattern.xattention import antidiagonal_mass

SIZE, STRIDE, SAMPLED = 128, 16, 64
SHARES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
NEAREST = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # blocks of a window
FAR = 8  # blocks
TARGETS = (0.05, 0.10, 0.20)
FIELDS = (
    "date commit model text tokens layers rows form share recall worst_decile far_recall density multiply_adds "
    "scores"
)

Point = tuple[float, float, float, float]  # density, recall, worst decile, far recall


@dataclass(frozen=True)
class Layer:
    """One layer: q (1, tokens, q_heads, head_dim), k (1, tokens, kv_heads, head_dim), fp32."""

    q: Tensor
    k: Tensor
    scale: float

    @property
    def blocks(self) -> int:
        return self.q.shape[1] // SIZE

    @property
    def shard(self) -> SequenceShard:
        return SequenceShard.whole(self.q.shape[1])

    @property
    def causal(self) -> Tensor:
        return torch.ones(self.blocks, self.blocks, dtype=torch.bool).tril()

    def by_row(self, mass: Tensor, share: float) -> SparseIndex:
        """xattention's choice from any mass, (q_heads, blocks, blocks)."""
        forced = torch.eye(self.blocks, dtype=torch.bool)
        forced[:, 0] = True
        return self.shard.block_index(SIZE, (heaviest_blocks(mass, forced, share) & self.causal)[None])

    def by_map(self, mass: Tensor, share: float) -> SparseIndex:
        """flexprefill's choice of a query-aware head."""
        chosen = heaviest_pairs(mass[None].contiguous(), share, self.blocks, Alone())[0]
        chosen |= torch.eye(self.blocks, dtype=torch.bool)
        chosen[..., 0] = True
        return self.shard.block_index(SIZE, (chosen & self.causal)[None])


def squares(layer: Layer, stride: int) -> Tensor:
    return antidiagonal_mass(layer.q, layer.k, layer.shard, layer.scale, SIZE, stride)[0]


def queries_pooled(layer: Layer) -> Tensor:
    """Mass with one row of squares a block: the mean of its rows."""
    blocks, dim = layer.blocks, layer.q.shape[3]
    q = layer.q.unflatten(1, (blocks, -1, STRIDE)).mean(2).permute(0, 1, 3, 2, 4).flatten(3)
    k = (
        layer.k.unflatten(1, (-1, STRIDE))
        .flip(2)
        .permute(0, 1, 3, 2, 4)
        .reshape(1, -1, layer.k.shape[2], STRIDE * dim)
    )
    scores = grouped_products(q, k)[0] * (layer.scale / STRIDE)
    future = ~layer.causal.repeat_interleave(SIZE // STRIDE, 1)
    return scores.masked_fill_(future, -torch.inf).softmax(-1).unflatten(-1, (blocks, -1)).sum(-1)


def sampled_rows(layer: Layer) -> Tensor:
    """Mass of every row from some rows of blocks: 64, or half of them in shorter sequences."""
    every, row = squares(layer, STRIDE), torch.arange(layer.blocks)
    step = max(2, layer.blocks // SAMPLED)
    scored = torch.arange(step - 1, layer.blocks, step)
    above = torch.searchsorted(scored, row).clamp(max=len(scored) - 1)
    total = torch.zeros_like(every)
    for source in (scored[above], scored[(above - 1).clamp(min=0)]):
        key = row + (source - row)[:, None]  # the same distance in the source's row
        inside = (key >= 0) & (key < layer.blocks)
        place = key.clamp(0, layer.blocks - 1).expand_as(every)
        total += every[:, source] + every[:, source].gather(2, place) * inside
    return total * layer.causal


def means(layer: Layer, of: int) -> Tensor:
    """Softmax of mean queries times mean keys of ``of`` blocks, given to each of their pairs."""
    q, k = (x.unflatten(1, (-1, of * SIZE)).mean(2) for x in (layer.q, layer.k))
    scores = grouped_products(q, k)[0] * layer.scale
    scores = (
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) / of
    )
    return scores.repeat_interleave(of, 1).repeat_interleave(of, 2) * layer.causal


def forms(layer: Layer) -> Iterator[tuple[str, float, SparseIndex]]:
    """(form, its budget, what it chooses)."""
    rows: dict[str, Callable[[], Tensor]] = {
        "stride 16": partial(squares, layer, STRIDE),
        "stride 128": partial(squares, layer, SIZE),
        "queries pooled": partial(queries_pooled, layer),
        "64 rows of blocks": partial(sampled_rows, layer),
        "means": partial(means, layer, 1),
        "means of 2": partial(means, layer, 2),
        "means of 4": partial(means, layer, 4),
    }
    for form, make in rows.items():
        mass = make()
        for share in SHARES:
            yield form, share, layer.by_row(mass, share)
    for of in (1, 2, 4):
        mass = means(layer, of)
        for share in SHARES:
            yield ("map" if of == 1 else f"map of {of}"), share, layer.by_map(mass, share)
    for share in SHARES:
        for refine in (3, 4, 8):
            one = build_pattern("xattention", threshold=share, refine=refine)
            yield f"refine {refine}", share, one.estimate(layer.q, layer.k, layer.shard, layer.scale)
            one = build_pattern("flexprefill", gamma=share, tau=9.0, refine=refine)
            yield f"map, refine {refine}", share, one.estimate(layer.q, layer.k, layer.shard, layer.scale)
        for refine in (0, 4):
            one = build_pattern("flexprefill", gamma=share, refine=refine)
            name = f"flexprefill, refine {refine}" if refine else "flexprefill"
            yield name, share, one.estimate(layer.q, layer.k, layer.shard, layer.scale)
    for nearest in NEAREST:
        one = build_pattern("a_shape", sinks=SIZE, window=(nearest - 1) * SIZE + 1)
        yield "window", nearest, one.estimate(layer.q, layer.k, layer.shard, layer.scale)


def work(form: str, tokens: int, dim: int) -> tuple[float, float]:
    """Products of q.k and scores of one head, in millions; nothing for a window."""
    blocks, of_block = tokens // SIZE, SIZE // STRIDE
    pairs = tokens**2 / 2
    if form == "window":
        return 0.0, 0.0
    if form.startswith("stride"):
        stride = int(form.split()[1])
        return pairs / stride * dim / 1e6, pairs / stride**2 / 1e6
    if form == "queries pooled":
        return pairs / SIZE * dim / 1e6, pairs / SIZE / STRIDE / 1e6
    if form == "64 rows of blocks":
        rows = min(SAMPLED, blocks // 2) * of_block
        return rows * tokens * dim / 2 / 1e6, rows * tokens / STRIDE / 2 / 1e6
    if "refine" in form:
        width, refine = super_block(blocks), int(form.split()[-1])
        scores = blocks * (blocks / width / 2 + min(refine * width, blocks))
        return scores * dim / 1e6, scores / 1e6
    of = int(form.split()[-1]) if form[-1].isdigit() else 1
    return blocks**2 / 2 / of**2 * dim / 1e6, blocks**2 / 2 / of**2 / 1e6


class Measured:
    """Recall of an index on some rows: of all keys, and of far ones.

    Args:
        truth: fp32 (q_heads, rows, tokens), true attention.
        rows: int64, which queries these are.
    """

    def __init__(self, truth: Tensor, rows: Tensor) -> None:
        token = torch.arange(truth.shape[2])
        far = (token // SIZE <= rows[:, None] // SIZE - FAR) & (token >= SIZE)
        self.rows, self.truth, self.far = rows, truth, truth * far
        self.by_block, self.far_by_block = (x.unflatten(-1, (-1, SIZE)).sum(-1) for x in (truth, self.far))

    def recalls(self, index: SparseIndex) -> tuple[Tensor, Tensor]:
        """Share of a head's attention that is kept: (q_heads,) each."""
        if index.columns.shape[2]:
            every, far = (index_recall(index, x, self.rows) for x in (self.truth, self.far))
        else:
            block = torch.arange(index.num_blocks)
            tiles = index.tile_mask(block, block)[0][:, self.rows // SIZE]
            every, far = ((x * tiles).sum(-1) for x in (self.by_block, self.far_by_block))
        return every.mean(1), far.sum(1) / self.far_by_block.sum((1, 2))


def at_density(points: Sequence[Point], density: float) -> tuple[float, ...] | None:
    """Recall, worst decile and far recall between the two budgets around a density; None beyond all of them."""
    for left, right in pairwise(sorted(points)):
        if left[0] <= density <= right[0] and left[0] < right[0]:
            share = (density - left[0]) / (right[0] - left[0])
            return tuple(a + share * (b - a) for a, b in zip(left[1:], right[1:], strict=True))
    return None


def captured_layers(options: argparse.Namespace) -> dict[int, tuple[Tensor, Tensor, float]]:
    """q (1, tokens, q_heads, head_dim), k (1, tokens, kv_heads, head_dim) and scale of each wanted layer."""
    if options.captured and options.captured.exists():
        return dict(torch.load(options.captured))
    rope = RopeOptions(type="yarn" if options.tokens > options.native else "none")
    model, tokenizer = build_model(ModelOptions(init=options.model, rope=rope), seq_len=options.tokens)
    ids = read_ids(options, tokenizer, options.tokens)
    if ids.shape[1] < options.tokens:
        raise SystemExit(f"the text has {ids.shape[1]} tokens, fewer than --tokens {options.tokens}")
    layers: dict[int, tuple[Tensor, Tensor, float]] = {}

    def visit(number: int, q: Tensor, k: Tensor, scale: float) -> None:
        if number in options.layers:
            layers[number] = q.half(), k.half(), scale

    del model.model.layers[max(options.layers) + 1 :]
    visit_attention(model, ids, visit)
    if options.captured:
        torch.save(layers, options.captured)
    return layers


def main() -> None:
    parser = text_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--native", type=int, default=8192, help="context of the model; YaRN beyond it")
    parser.add_argument(
        "--captured", type=Path, help="keep queries and keys here, in fp16; read them if they are there"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/estimate-forms.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = held_out_rows(options.tokens, options.rows, torch.empty(0, dtype=torch.int64))
    captured = captured_layers(options)
    found: dict[tuple[str, float], list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
    for number in options.layers:
        q, k, scale = captured[number]
        layer = Layer(q.float(), k.float(), scale)
        truth = torch.stack(
            [attention_rows(layer.q, layer.k, rows, head, scale) for head in range(q.shape[2])]
        )
        measured = Measured(truth, rows)
        for form, share, index in forms(layer):
            found[form, share].append((*measured.recalls(index), index.cost()[0]))
        print(f"layer {number}", flush=True)
    origin = [date.today(), code_version(), options.model, options.text.name, options.tokens]
    origin += [" ".join(map(str, options.layers)), len(rows)]
    curves: dict[str, list[Point]] = defaultdict(list)
    dim = q.shape[3]
    with appended(options.out, FIELDS.split()) as write:
        for (form, share), layers in found.items():
            recall, kept, density = (torch.cat(parts) for parts in zip(*layers, strict=True))
            worst = recall.sort().values[: max(1, len(recall) // 10)].mean().item()
            point = density.mean().item(), recall.mean().item(), worst, kept.mean().item()
            curves[form].append(point)
            numbers = [f"{x:.4f}" for x in (*point[1:], point[0])]
            write([*origin, form, share, *numbers, *(f"{x:.4g}" for x in work(form, options.tokens, dim))])
    print(f"{options.text.name}, {options.tokens} tokens: recall (worst decile), far recall at a density")
    for form, points in curves.items():
        cells = []
        for target in TARGETS:
            reached = at_density(points, target)
            cells.append(f"{reached[0]:.3f} ({reached[1]:.3f}), {reached[2]:.3f}" if reached else "-")
        cells += [f"{x:.4g}" for x in work(form, options.tokens, dim)]
        print(f"| {form} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
