"""Rates of one GPU: attention kernels, products, and what surrounds them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from mtraining.bench.attention.cases import Case
from mtraining.bench.attention.problem import Layer, build
from mtraining.bench.timing import measure
from mtraining.bench.train.cases import Shape
from mtraining.bench.train.model import build_model
from mtraining.errors import UserError
from mtraining.kernel import Backend, select_backend
from mtraining.layout import build_layout
from mtraining.model.fused import FUSED, fuse
from mtraining.model.loss import chunked_cross_entropy
from mtraining.model.support import decoder_of
from mtraining.pattern import SequenceShard, VerticalSlash
from mtraining.predict.step_time import AROUND_HIDDEN, AROUND_MLP, ModelShape
from mtraining.predict.work import Index

Say = Callable[[str], None]
# Seconds of untimed work: a board that was idle runs for longer than one second at clocks that training does not keep.
_WARM_UP = 2.0
PHASES = ("forward", "backward")


@dataclass(frozen=True)
class Sizes:
    """What is timed.

    Attributes:
        many, few: attention of many and of few tiles a row, with which a row's own cost is told from a tile's.
        columns: attention with columns; the same, ``dense``: every tile.
        shape: of the layer around attention and of the loss; ``tokens`` of them.
        copied: bytes of the copies in memory and to the host.
        messages: bytes of messages between GPUs.
    """

    many: Case
    few: Case
    columns: Case
    dense: Case
    shape: Shape
    tokens: int
    copied: int
    messages: tuple[int, ...]


class Rater:
    """Times one thing after another on a device, and notes what it takes from where."""

    def __init__(self, sizes: Sizes, device: torch.device, kernel: str, seconds: float, say: Say) -> None:
        self.sizes, self.device, self.kernel, self.seconds = sizes, device, kernel, seconds
        self.dtype, self._begin = sizes.many.dtype, time.perf_counter()
        self._say = say

    def say(self, text: str) -> None:
        """Tell progress, with the seconds since the beginning."""
        self._say(f"[{time.perf_counter() - self._begin:5.1f} s] {text}")

    def time(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        return measure(run, self.device, self.seconds, _WARM_UP).ms / 1000

    def attention(self, head_dim: int) -> dict[str, list[float]]:
        """Nanoseconds (forward, backward) by part, as `mtraining.predict.measured.AttentionRates` has them."""
        sizes = self.sizes
        backend = select_backend(self.kernel, self.device, self.dtype, head_dim)
        self.say(f"attention at head_dim {head_dim} by {backend.name}: four indices, forward and backward")
        many, few = (self._layer(case, head_dim, backend) for case in (sizes.many, sizes.few))
        with_columns, dense = (self._layer(case, head_dim, backend) for case in (sizes.columns, sizes.dense))
        found: dict[str, list[float]] = {"tile_ns": [], "row_ns": [], "column_ns": [], "dense_ns": []}
        for phase in PHASES:
            (tiles, rows, _, long), (fewer, fewer_rows, _, short) = many[phase], few[phase]
            # long = tiles x tile + rows x row, and the same for the short one.
            tile = (long / rows - short / fewer_rows) / (tiles / rows - fewer / fewer_rows)
            row = max(0.0, long / rows - tile * tiles / rows)
            count, their_rows, area, taken = with_columns[phase]
            column = (taken - tile * count - row * their_rows) / area
            if tile <= 0 or column <= 0:
                raise UserError(
                    f"bench rates: {phase} at head_dim {head_dim} took no longer with more work, so nothing was "
                    "learnt; run it again while nothing else uses the GPU."
                )
            every, _, _, whole = dense[phase]
            for name, value in zip(found, (tile, row, column, whole / every), strict=True):
                found[name].append(round(1e9 * value, 3))
        self.say(f"ns (forward, backward): {found}")
        return found

    def _layer(
        self, case: Case, head_dim: int, backend: Backend
    ) -> dict[str, tuple[float, int, float, float]]:
        """(tiles of 128 x 128, block rows, column tiles, seconds) of each pass, over all heads."""
        case = replace(case, head_dim=head_dim)
        problem = build(case, self.device, seed=1)
        index = Index.of(problem.index, case.columns)
        dealt = build_layout("contiguous", 1)
        scaled = (case.block_size / 128) ** 2 * case.q_heads
        tiles = float(index.tiles(dealt, 1).sum()) * scaled
        area = float(index.column_tiles(dealt, 1).sum()) * scaled
        rows = case.q_heads * case.seq_len // 128 or 1
        taken = {phase: self.time(run) for phase, run in Layer(backend, problem).phases().items()}
        return {phase: (tiles, rows, area, seconds) for phase, seconds in taken.items()}

    def matmul_flops(self) -> float:
        """FLOP/s of the products of a gated MLP, forward and both of backward."""
        shape, tokens = self.sizes.shape, self.sizes.tokens
        x, dy = self._random(tokens, shape.hidden), self._random(tokens, shape.mlp)
        weight = self._random(shape.mlp, shape.hidden)

        def products() -> None:
            x @ weight.T
            dy @ weight
            dy.T @ x

        return 6 * tokens * shape.hidden * shape.mlp / self.time(products)

    def around_bytes(self, fused: str, flops: float) -> float:
        """Bytes per second of what surrounds attention in a layer, which here gives back its queries."""
        shape, tokens = self.sizes.shape, self.sizes.tokens
        model = build_model(shape, tokens, 1, self.device).to(self.dtype)
        AttentionInterface.register(_NOTHING, _queries_back)
        model.config._attn_implementation = _NOTHING
        sized = ModelShape.of(model)
        fuse(model, fused, self.device)
        decoder = decoder_of(model)
        x = self._random(1, tokens, shape.hidden).requires_grad_()
        positions = torch.arange(tokens, device=self.device)[None]
        rotary = decoder.rotary_emb(x.detach(), positions)
        dout = torch.ones_like(x)

        def layer() -> None:
            # Gradients that are there would be added to.
            model.zero_grad(set_to_none=True)
            x.grad = None
            out = decoder.layers[0](
                x, attention_mask=None, position_ids=positions, position_embeddings=rotary
            )
            (out[0] if isinstance(out, tuple) else out).backward(dout)

        keys = 2 * shape.hidden * shape.kv_heads * sized.head_dim
        products = (2 * sized.linear + 4 * (sized.linear - keys)) * tokens / flops
        rest = self.time(layer) - products
        traffic = 2 * (sum(AROUND_HIDDEN) * shape.hidden + sum(AROUND_MLP) * shape.mlp) * tokens
        return traffic / self._positive(rest, f"what surrounds attention, fused={fused}")

    def logit_seconds(self, fused: str, flops: float) -> float:
        """Of the loss besides its products."""
        shape, tokens = self.sizes.shape, self.sizes.tokens
        hidden = self._random(tokens, shape.hidden).requires_grad_()
        weight = self._random(shape.vocab, shape.hidden).requires_grad_()
        labels = torch.zeros(tokens, dtype=torch.int64, device=self.device)

        def loss() -> None:
            hidden.grad = weight.grad = None
            chunked_cross_entropy(hidden, weight, labels, tokens, compiled=fused != "none").backward()

        rest = self.time(loss) - 6 * tokens * shape.hidden * shape.vocab / flops
        return self._positive(rest, f"the loss, fused={fused}") / (tokens * shape.vocab)

    def memory_bytes(self) -> float:
        """Bytes per second of a copy, read and written."""
        source = torch.zeros(self.sizes.copied, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * self.sizes.copied / self.time(lambda: target.copy_(source))

    def host_bytes(self) -> float | None:
        """Bytes per second of a copy to pinned host memory; None without a GPU."""
        if self.device.type != "cuda":
            return None
        source = torch.zeros(self.sizes.copied, dtype=torch.int8, device=self.device)
        target = torch.empty(self.sizes.copied, dtype=torch.int8, pin_memory=True)
        return self.sizes.copied / self.time(lambda: target.copy_(source, non_blocking=True))

    def estimate_seconds(self) -> float:
        """Of an index by the default estimation, for each token and query head."""
        case = self.sizes.columns
        problem = build(case, self.device, seed=1)
        backend = select_backend(self.kernel, self.device, self.dtype, case.head_dim)
        shard = SequenceShard(torch.arange(case.seq_len, device=self.device)[None], backend=backend)
        pattern = VerticalSlash(block_size=case.block_size)
        taken = self.time(lambda: pattern.estimate(problem.q, problem.k, shard, problem.scale))
        return taken / (case.seq_len * case.q_heads)

    def around(self, flops: float) -> tuple[dict[str, float], dict[str, float]]:
        """(logit_ps, around_gb_per_s) of each ``fused`` that can run here."""
        logits: dict[str, float] = {}
        layers: dict[str, float] = {}
        for fused in FUSED:
            self.say(f"what surrounds attention, and the loss, with fused={fused}")
            try:
                layers[fused] = round(self.around_bytes(fused, flops) / 1e9, 1)
                logits[fused] = round(1e12 * self.logit_seconds(fused, flops), 3)
            except UserError as refusal:
                layers.pop(fused, None)
                self.say(f"fused={fused}: not measured: {refusal}")
        return logits, layers

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=self.dtype, device=self.device)

    @staticmethod
    def _positive(seconds: float, what: str) -> float:
        if seconds <= 0:
            raise UserError(
                f"bench rates: {what} took less time than its products alone; run it again while nothing else uses "
                "the GPU."
            )
        return seconds


_NOTHING = "mtraining_rates_nothing"


def _queries_back(module: Any, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Attention that costs nothing: (batch, heads, tokens, head_dim) queries as the output."""
    return query.transpose(1, 2).contiguous(), None
