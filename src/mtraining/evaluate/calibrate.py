"""The offline search: for each head of a model, the pattern and budget that keep most attention for their cost.

MInference (arXiv 2407.02490, section 3.2) gives every head the pattern that keeps most under one budget of FLOPs.
Here the budget is the model's: heads are given candidates from cheap to dear, best bargain first (recall gained for
cost added), until their mean cost reaches what was asked; so a head that needs little leaves room for one that
needs much. A head costs the area that a kernel computes for it over that of full attention, an entry of a column
counted at its price beside one of a tile (:mod:`mtraining.bench.attention.price`). Recall is taken on real text, exact
attention, and rows outside the probe; half of these rows choose, the other half say what was gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtraining.errors import UserError
from mtraining.evaluate.capture import visit_attention
from mtraining.evaluate.recall import attention_rows, held_out_rows, index_recall
from mtraining.evaluate.svg import write_svg
from mtraining.inputs.text import read_text, text_files
from mtraining.kernel import SparseIndex, Window, reach_of, select_backend
from mtraining.model.windows import band
from mtraining.pattern import AShape, Dense, Pattern, SequenceShard, VerticalSlash
from mtraining.pattern.probe import column_and_slash_mass, probe_positions
from mtraining.pattern.table import describe

COLUMNS = (32, 128, 512, 1024, 2048, 4096)
SLASH_DENSITIES = (0.005, 0.01, 0.02, 0.035, 0.05, 0.08, 0.12, 0.2, 0.35)
WINDOWS = (1024, 4096)


@dataclass(frozen=True)
class Calibration:
    """What a search found.

    Attributes:
        candidates: the patterns tried.
        chosen: for each layer without a window, the number of each head's candidate.
        density: mean density over layers and heads: what is attended, a share of full attention's tiles.
        cost: mean cost over layers and heads: what is multiplied, with columns at their price.
        recall: mean recall over layers and heads, on rows that did not choose.
        curve: (cost, recall) of the search at every cost up to full attention.
        uniform: (cost, recall) of every candidate given to all heads alike.
    """

    candidates: list[Pattern]
    chosen: list[list[int]]
    density: float
    cost: float
    recall: float
    curve: list[tuple[float, float]]
    uniform: list[tuple[float, float]]

    @property
    def best_uniform(self) -> tuple[float, float]:
        """(cost, recall) of the best one budget for all heads that costs no more than what was chosen."""
        affordable = [point for point in self.uniform if point[0] <= self.cost]
        return max(affordable or [min(self.uniform)], key=lambda point: point[1])

    def table(self, about: dict[str, Any], windows: Sequence[Window | None] | None = None) -> dict[str, Any]:
        """The table that `pattern.table` reads, with ``about`` to tell where it comes from.

        Args:
            windows: of each layer; None where no layer has any. Layers with windows get the pattern that they have.
        """
        used = sorted({number for layer in self.chosen for number in layer})
        names = {number: _name(self.candidates[number]) for number in used}
        patterns = {names[number]: describe(self.candidates[number]) for number in used}
        searched = iter([names[number] for number in layer] for layer in self.chosen)
        layers: list[Any] = []
        for window in windows or [None] * len(self.chosen):
            if window is None:
                layers.append(next(searched))
            else:
                layers.append(f"within_{reach_of(window)}")
                patterns[layers[-1]] = describe(band(window, self.candidates[0].block_size))
        return {
            "about": about
            | {
                "expected_density": round(self.density, 4),
                "expected_cost": round(self.cost, 4),
                "expected_recall": round(self.recall, 4),
            },
            "patterns": patterns,
            "layers": layers,
        }


def candidates(base: VerticalSlash, tokens: int) -> list[Pattern]:
    """What every head may be given: budgets of ``base`` that suit ``tokens``, a streaming window, everything."""
    found: list[Pattern] = []
    for columns in sorted({max(base.sinks, number) for number in COLUMNS if number <= tokens // 4}):
        for density in SLASH_DENSITIES:
            found.append(
                replace(base, top_p=None, top_k_columns=columns, slash_by="block", slash_density=density)
            )
    windows = [number for number in WINDOWS if number <= tokens // 4]
    found += [AShape(block_size=base.block_size, sinks=base.sinks, window=window) for window in windows]
    return [*found, Dense(block_size=base.block_size)]


def calibrate(
    hf_model: Any,
    sequences: Tensor,
    base: VerticalSlash,
    density: float,
    rows: int = 128,
    price: float = 1.0,
    seed: int = 0,
) -> Calibration:
    """Search a model's heads on some sequences.

    Args:
        hf_model: a transformers causal language model, not yet parallelised.
        sequences: int64 (samples, tokens), on the model's device; each is run by itself.
        base: the vertical-slash whose budget is searched: its probe, sinks, window and block size are kept.
        density: mean cost that the heads may have, as a share of full attention.
        rows: query rows of each sequence whose attention is compared.
        price: of an entry in a column beside one in a tile.
        seed: of the rows.

    Layers with a window are left out: no pattern chooses there.

    Raises:
        UserError: a density below that of the cheapest candidate.
    """
    tokens = sequences.shape[1]
    tried = candidates(base, tokens)
    probe = probe_positions(base.probe, base.probe_at, tokens, sequences.device)
    layers: dict[int, list[Tensor]] = {}
    for number, sequence in enumerate(sequences):
        sampled = held_out_rows(tokens, rows, probe, seed + number)

        def visit(layer: int, q: Tensor, k: Tensor, scale: float, sampled: Tensor = sampled) -> None:
            layers.setdefault(layer, []).append(_try(tried, base, q, k, scale, sampled).cpu())

        visit_attention(hf_model, sequence[None], visit)
    # (layers, heads, candidates) of recall that chooses, recall that reports, cost of tiles, cost of columns, density
    means = torch.stack([torch.stack(layers[n]).mean(0) for n in sorted(layers)])
    shape = means.shape[:2]
    chooses, reports, tiles, columns, densities = means.flatten(0, 1).unbind(-1)
    cost = tiles + price * columns
    least = cost.amin(1).mean().item()
    if density < least:
        raise UserError(
            f"--density {density} is less than the cheapest budget costs at {tokens} tokens ({least:.4f}: sinks, "
            f"window and {COLUMNS[0]} columns); use a density of at least {least:.4f}, or more tokens."
        )
    steps = bargains(chooses, cost)
    curve, chosen = [], None
    for state in steps:
        picked = cost.gather(1, state[:, None]).mean().item(), reports.gather(1, state[:, None]).mean().item()
        if picked[0] <= density:
            chosen = state
        curve.append(picked)
    assert chosen is not None  # the first state is the cheapest
    return Calibration(
        candidates=tried,
        chosen=chosen.view(shape).tolist(),
        density=densities.gather(1, chosen[:, None]).mean().item(),
        cost=cost.gather(1, chosen[:, None]).mean().item(),
        recall=reports.gather(1, chosen[:, None]).mean().item(),
        curve=curve,
        uniform=list(zip(cost.mean(0).tolist(), reports.mean(0).tolist(), strict=True)),
    )


def bargains(recall: Tensor, cost: Tensor) -> list[Tensor]:
    """From every head's cheapest candidate to its best, the best bargain over all heads first.

    Only candidates on a head's upper convex hull of (cost, recall) are ever taken, so each head's own bargains come in
    order; this is the best choice for every total cost that it stops at (Lagrange).

    Args:
        recall, cost: (heads, candidates).

    Returns:
        int64 (heads,) candidates, one for each step.
    """
    offers, start = [], []
    for head, (gains, prices) in enumerate(zip(recall.tolist(), cost.tolist(), strict=True)):
        hull: list[int] = []
        for number in sorted(range(len(prices)), key=lambda i: (prices[i], -gains[i])):
            if hull and gains[number] <= gains[hull[-1]]:
                continue
            while len(hull) > 1 and (gains[hull[-1]] - gains[hull[-2]]) * (
                prices[number] - prices[hull[-2]]
            ) <= (gains[number] - gains[hull[-2]]) * (prices[hull[-1]] - prices[hull[-2]]):
                hull.pop()
            hull.append(number)
        start.append(hull[0])
        for a, b in pairwise(hull):
            offers.append(((gains[b] - gains[a]) / max(prices[b] - prices[a], 1e-12), head, b))
    state = torch.tensor(start)
    states = [state]
    for _, head, number in sorted(offers, key=lambda offer: -offer[0]):
        state = state.clone()
        state[head] = number
        states.append(state)
    return states


def _try(
    tried: Sequence[Pattern], base: VerticalSlash, q: Tensor, k: Tensor, scale: float, rows: Tensor
) -> Tensor:
    """Every candidate on one layer: fp32 (q_heads, candidates, 5), recall on even rows, on odd rows, cost of tiles and
    of columns, and density."""
    positions = torch.arange(q.shape[1], device=q.device)[None]
    shard = SequenceShard(positions, backend=select_backend("auto", q.device, q.dtype, q.shape[3]))
    attention = torch.stack([attention_rows(q, k, rows, head, scale) for head in range(q.shape[2])])
    probe = probe_positions(base.probe, base.probe_at, shard.seq_len, q.device)
    verticals, slashes = column_and_slash_mass(q, k, probe, shard, scale, base.block_size)
    found = []
    for pattern in tried:
        if isinstance(pattern, VerticalSlash):
            columns, diagonals = pattern.select(verticals, slashes, shard.backend)
            index = SparseIndex(shard.seq_len, pattern.block_size, diagonals[None], columns[None].int())
        else:
            index = pattern.estimate(q, k, shard, scale)
        recall = index_recall(index, attention, rows)
        parts = [recall[:, ::2].mean(1), recall[:, 1::2].mean(1)]
        parts += [x[0].float() for x in (*costs(index), index.density())]
        found.append(torch.stack(parts, -1))
    return torch.stack(found, 1)


def costs(index: SparseIndex) -> tuple[Tensor, Tensor]:
    """:meth:`SparseIndex.cost` of tiles and of columns: float64 (batch, q_heads) each."""
    tiles = replace(index, columns=index.columns[..., :0]).cost()
    return tiles, index.cost() - tiles


def _name(pattern: Pattern) -> str:
    if isinstance(pattern, VerticalSlash):
        return f"columns{pattern.top_k_columns}_slashes{pattern.slash_density:g}"
    return f"window{pattern.window}" if isinstance(pattern, AShape) else pattern.name


def read_sequences(path: Path, tokenizer: Any, tokens: int, samples: int) -> Tensor:
    """The first ``samples`` times ``tokens`` tokens of a text file, or of a folder's text files in order.

    Returns:
        int64 (samples, tokens).

    Raises:
        UserError: no text there, or too little.
    """
    files = text_files(path)
    ids: list[int] = []
    for file in files:
        try:
            text = read_text(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"DATA: {file} cannot be read as text ({error}); give a text file or a folder of them."
            ) from None
        room = samples * tokens - len(ids)
        ids += tokenizer(
            text[: 16 * room], verbose=False
        ).input_ids  # no tokenizer needs 16 characters a token
        if len(ids) >= samples * tokens:
            return torch.tensor(ids[: samples * tokens]).view(samples, tokens)
    raise UserError(
        f"DATA: {path} holds {len(ids)} tokens, fewer than --samples {samples} x --tokens {tokens}; give more text "
        "or lower one of them."
    )


def draw(found: Calibration, path: Path) -> None:
    """Write recall against density as SVG: the search, and one budget for all heads."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the chart needs matplotlib; install mtraining[report], or use --no-chart.") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    one, searched = torch.tensor(found.uniform).T, torch.tensor(found.curve).T
    axes.scatter(one[0], one[1], s=12, color="0.6", label="one budget for all heads")
    axes.plot(searched[0], searched[1], color="C0", label="searched for each head")
    axes.plot(
        [found.cost],
        [found.recall],
        "o",
        color="C3",
        label=f"chosen: {found.cost:.1%}, {found.recall:.1%}",
    )
    axes.set(xscale="log", xlabel="density at the kernel's prices (share of full attention)")
    axes.set(ylabel="recall (attention mass kept)", ylim=(None, 1.005))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_svg(figure, path)
