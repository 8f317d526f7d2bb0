"""The attention of one text by layer and head: where its mass is, what a pattern keeps of it, and what it misses.

Attention is exact and causal, in layers with a window within that. It is of a sample of query rows that are spread
evenly over the text. A layer needs the memory of one head's sampled rows at a time: rows x tokens in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.evaluate.capture import visit_attention
from mtraining.evaluate.recall import attention_rows
from mtraining.kernel import SparseIndex, Window, select_backend
from mtraining.kernel.starts import window_starts
from mtraining.model.windows import band, in_words
from mtraining.pattern import Pattern, SequenceShard

CELLS = 200_000  # of all maps together, so that a page stays small
SIDES = (8, 64)  # cells along an edge of a map, at least and at most


@dataclass(frozen=True)
class Miss:
    """One pair of tokens with much attention that a pattern leaves out: positions, and its share of the row's mass."""

    layer: int
    head: int
    query: int
    key: int
    mass: float


@dataclass
class Inspection:
    """What was found.

    Attributes:
        rows: int64, the query rows that were looked at.
        recall, density: float64 (layers, q_heads).
        distances: edges of bands of distances in tokens, powers of two; a band begins at its edge.
        mass, kept: float64 (layers, q_heads, bands), mean share of a row's mass, in all and kept by the pattern.
        maps: float32 (layers, q_heads, side, side), mean mass of a row of the query cell in each key cell.
        chosen: float32, the same shape, share of the causal pairs of each cell that the pattern computes.
        misses: by layer and head, the pairs with most mass that are left out, most first.
        windows: by number of a layer, its window in words. Such a layer computes all that it attends to, and nothing
            beyond has mass.
    """

    tokens: int
    rows: Tensor
    recall: Tensor
    density: Tensor
    distances: list[int]
    mass: Tensor
    kept: Tensor
    maps: Tensor
    chosen: Tensor
    misses: list[Miss] = field(default_factory=list)
    windows: dict[int, str] = field(default_factory=dict)

    def means(self) -> tuple[float, float]:
        """Recall and density over the heads of the layers where a pattern chooses; of all, where none does."""
        chosen = [layer for layer in range(len(self.recall)) if layer not in self.windows]
        layers = chosen or list(range(len(self.recall)))
        return self.recall[layers].mean().item(), self.density[layers].mean().item()


def inspect_attention(
    hf_model: Any,
    ids: Tensor,
    patterns: Sequence[Pattern],
    rows: int = 128,
    misses: int = 5,
    tell: Callable[[str], None] = lambda text: None,
) -> Inspection:
    """Read one text with exact attention, and compare each layer's pattern with it.

    Args:
        hf_model: a transformers causal language model, not yet parallelised.
        ids: int64 (tokens,), on the model's device; a multiple of every pattern's block size.
        patterns: one a layer.
        rows: query rows to look at; all of them where the text has fewer.
        misses: pairs to keep of each head.
        tell: is given a line after each layer.

    Raises:
        UserError: a length that is not a multiple of a block size, or beyond the model's positions.
    """
    tokens = len(ids)
    positions = getattr(hf_model.config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(
            f"TEXT: {tokens} tokens are beyond the {positions} positions of the model; lower --tokens."
        )
    for pattern in patterns:
        if tokens % pattern.block_size or not tokens:
            raise UserError(
                f"TEXT: {tokens} tokens are not a multiple of the pattern's block size {pattern.block_size}; "
                "choose another --tokens."
            )
    sampled = torch.linspace(0, tokens - 1, min(rows, tokens), device=ids.device).round().long().unique()
    heads = hf_model.config.num_attention_heads
    side = map_side(len(patterns) * heads, len(sampled))
    distances = [0] + [2**power for power in range((tokens - 1).bit_length())]
    layers: dict[int, list[dict[str, Tensor]]] = {}
    found: list[Miss] = []
    windows: dict[int, str] = {}

    def visit(layer: int, q: Tensor, k: Tensor, scale: float, window: Window | None = None) -> None:
        shard = SequenceShard(
            torch.arange(tokens, device=q.device)[None],
            backend=select_backend("auto", q.device, q.dtype, q.shape[3]),
        )
        pattern, starts = patterns[layer], None
        if window is not None:
            windows[layer] = in_words(window)
            pattern = band(window, pattern.block_size)
            starts = window_starts(tokens, window, q.device)[0]
        index = pattern.estimate(q, k, shard, scale)
        layers[layer] = []
        density = index.density()[0].expand(q.shape[2])
        for head in range(q.shape[2]):
            attention = attention_rows(q, k, sampled, head, scale, starts)
            selected = selected_keys(index, sampled, head)
            if starts is not None:
                selected &= torch.arange(tokens, device=q.device) >= starts[sampled, None]
            part = _of_head(attention, selected, sampled, distances, side)
            layers[layer].append(part | {"density": density[head].cpu()})
            found.extend(_misses(layer, head, attention, selected, sampled, misses))
        recall = torch.stack([part["recall"] for part in layers[layer]])
        what = f" ({windows[layer]})" if layer in windows else ""
        tell(f"layer {layer}{what}: recall {recall.mean():.1%} at density {density.mean():.1%}")

    visit_attention(hf_model, ids[None], visit, visit)

    def joined(name: str) -> Tensor:
        return torch.stack([torch.stack([part[name] for part in layers[n]]) for n in sorted(layers)])

    parts = {name: joined(name) for name in ("recall", "density", "mass", "kept", "maps", "chosen")}
    return Inspection(
        tokens=tokens, rows=sampled.cpu(), distances=distances, misses=found, windows=windows, **parts
    )


def map_side(heads: int, rows: int) -> int:
    """Cells along an edge of each map: half of their square is below the diagonal, and `CELLS` are for all heads."""
    return max(SIDES[0], min(SIDES[1], int((2 * CELLS / heads) ** 0.5), rows))


def selected_keys(index: SparseIndex, rows: Tensor, head: int) -> Tensor:
    """Keys that an index computes for some rows of one head of the first sequence: bool (rows, tokens)."""
    one = slice(head, head + 1)
    blocks = None if index.blocks is None else index.blocks[:1, one]
    part = replace(index, diagonals=index.diagonals[:1, one], columns=index.columns[:1, one], blocks=blocks)
    every = torch.arange(index.num_blocks, device=rows.device)
    tiles = part.tile_mask(every, every)[0, 0][rows // index.block_size]
    selected = tiles.repeat_interleave(index.block_size, 1)
    columns = index.columns[0, head].long()
    selected[:, columns[columns < index.seq_len]] = True
    return selected & (torch.arange(index.seq_len, device=rows.device) <= rows[:, None])


def _of_head(
    attention: Tensor, selected: Tensor, rows: Tensor, distances: Sequence[int], side: int
) -> dict[str, Tensor]:
    tokens = attention.shape[1]
    token = torch.arange(tokens, device=rows.device)
    kept = attention * selected
    edges = torch.tensor(distances, device=rows.device)
    band = torch.bucketize((rows[:, None] - token).clamp(min=0), edges, right=True) - 1

    def by_band(mass: Tensor) -> Tensor:
        sums = torch.zeros(len(distances), dtype=torch.float64, device=rows.device)
        return sums.index_add_(0, band.flatten(), mass.flatten().double()) / len(rows)

    allowed = (token <= rows[:, None]).float()
    cells = [_cells(values, rows, side) for values in (attention, selected.float(), allowed)]
    of_row = torch.bincount(rows * side // tokens, minlength=side).clamp(min=1)[:, None]
    return {
        "recall": kept.sum(1).double().mean().cpu(),
        "mass": by_band(attention).cpu(),
        "kept": by_band(kept).cpu(),
        "maps": (cells[0] / of_row).cpu(),
        "chosen": (cells[1] / cells[2].clamp(min=1)).cpu(),
    }


def _cells(values: Tensor, rows: Tensor, side: int) -> Tensor:
    """Sums over the cells of a map: float32 (side, side), by query and key."""
    tokens = values.shape[1]
    key = torch.arange(tokens, device=rows.device) * side // tokens
    by_key = torch.zeros(len(rows), side, device=rows.device).index_add_(1, key, values)
    return torch.zeros(side, side, device=rows.device).index_add_(0, rows * side // tokens, by_key)


def _misses(
    layer: int, head: int, attention: Tensor, selected: Tensor, rows: Tensor, count: int
) -> list[Miss]:
    missed = attention.masked_fill(selected, 0.0).flatten()
    top = missed.topk(min(count, len(missed)))
    width = attention.shape[1]
    return [
        Miss(layer, head, int(rows[place // width]), place % width, mass)
        for mass, place in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        if mass > 0
    ]
