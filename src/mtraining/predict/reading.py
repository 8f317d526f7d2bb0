"""What reading prompts and answering them will take of a GPU's memory, before any GPU is touched.

Two of the model's layers read a prompt on the meta device, and the generator's own cache keeps the keys there.
Parameters follow from the model, and further layers add their part of the cache. A new token's forward is small beside
a prompt's. So the peak lies in a prompt: in a layer, or in what is made of the last layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mtraining.generate.cache import Attends, Attention, Cache, Dealt, Reading, Slots, attached
from mtraining.kernel import Window
from mtraining.layout import Layout
from mtraining.model import ParallelLM, parallelize
from mtraining.model.fixed_rope import fix_rope
from mtraining.model.logits import Head
from mtraining.model.loss import chunked_token_scores
from mtraining.model.support import layers_of
from mtraining.model.windows import windows_of
from mtraining.pattern import Pattern
from mtraining.predict.memory import Prediction, columns_of, on_shapes, shortened, widest
from mtraining.predict.trace import LAYERS, META, LiveBytes, ShapeRing, copied, shape_call
from mtraining.ring import Ring
from mtraining.ring.attention import PreparedCall, attend_prepared


@dataclass(frozen=True)
class ReadingWork:
    """Prompts that are read together, as far as memory goes.

    Attributes:
        hf_model: the whole transformers model, on any device (meta will do).
        ring: (outer, inner) ranks that share a prompt; each has all parameters.
        lengths: tokens of each prompt of the batch.
        new_tokens: that an answer has at most; 0 keeps no keys, as perplexity does.
        patterns: of the layers; the one with most columns counts.
        dtype: of parameters and activations.
        scored: every token's loss is asked for, and not an answer.
    """

    hf_model: Any
    ring: tuple[int, int]
    lengths: Sequence[int]
    new_tokens: int
    patterns: Sequence[Pattern]
    layout: Layout
    dtype: torch.dtype
    scored: bool = False
    loss_chunk: int = signature(parallelize).parameters["loss_chunk"].default


def predict_reading(work: ReadingWork) -> Prediction:
    """The peak on the rank that holds most, from the first prompt to the last new token.

    Raises:
        Unpredictable: the model's code reads numbers, as some that route tokens do.
        UserError: the layout's stripes cut a pattern's blocks.
    """
    layers = layers_of(work.hf_model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    short = shortened(work.hf_model, sizes.index(max(sizes))).to(work.dtype)
    fix_rope(short, max(work.lengths) + work.new_tokens)
    pattern = widest(work.hf_model, work.patterns, max(work.lengths))
    model = parallelize(short, pattern=pattern, layout=work.layout, recompute="none", fsdp=False)
    with on_shapes(short, "try a short prompt, and watch what the GPU's own tools say"):
        seen = _traced(work, model, pattern)
    standing = {
        "parameters": float(work.dtype.itemsize * sum(p.numel() for p in work.hf_model.parameters())),
        "keys and values": sum(
            seen.kept * seen.rooms[window] for window in windows_of(work.hf_model.config, len(layers))
        ),
    }
    last = "losses" if work.scored else "logits"
    moments = {
        "in the last layer": standing | {"working set of a layer": seen.layer},
        f"in the {last}": standing | {f"last layer's output, {last}": seen.output},
    }
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(totals, key=lambda name: totals[name])
    return Prediction(
        moment,
        {name: size for name, size in moments[moment].items() if size},
        totals,
        seen.attention,
        work=f"a prompt of {max(work.lengths)} tokens",
        remedies="more processes (--nproc, or torchrun), fewer prompts together, or shorter ones",
    )


@dataclass(frozen=True)
class _Seen:
    """Bytes of a model of :data:`LAYERS` layers, without parameters.

    Attributes:
        kept: one slot of a layer's keys and values, in every row. rooms: slots of a row, by the layer's window.
        layer, output: most beside all that is kept, in the layers and in what is made of their output.
        attention: most that one pass of attention has at a time.
    """

    kept: float
    rooms: dict[Window | None, int]
    layer: float
    output: float
    attention: int


def _traced(work: ReadingWork, model: ParallelLM, pattern: Pattern) -> _Seen:
    live = LiveBytes()
    live.ignore([*model.parameters(), *model.buffers()])
    attention = _ShapeAttention(
        (pattern,) * LAYERS,
        windows_of(model.hf_model.config, LAYERS),
        work.layout,
        None,
        "auto",
        work.ring,
        live,
        model.hf_model.config.num_attention_heads,
    )
    dealt = [attention.deal(length) for length in work.lengths]
    row = max(range(len(dealt)), key=lambda row: work.lengths[row])
    owner: Attends = Reading(attention, dealt[row])
    cache = Cache(attention, dealt, work.new_tokens - 1, META)
    if work.new_tokens:
        cache.prefill(row)
        owner = cache

    def read(hidden: Tensor, head: Head) -> Tensor:
        live.begin("output")
        if work.scored:
            labels = hidden.new_zeros(hidden.shape[:-1], dtype=torch.int64)
            return chunked_token_scores(hidden, head, labels, work.loss_chunk)
        # The first logits of every prompt, each by itself and together, stay while new tokens have their own.
        full = torch.promote_types(hidden.dtype, torch.float32)
        standing = hidden.new_empty(2, len(dealt), head.weight.shape[0], dtype=full)
        logits = head.logits(hidden.new_empty(len(dealt), hidden.shape[-1]))
        del standing
        return logits

    live.begin("layers")
    with attached(model, owner), live:
        tokens = torch.zeros(2, 1, len(dealt[row].positions), dtype=torch.int64, device=META)
        model.read_out(tokens[0], tokens[1], read)
    rooms = {
        window: Slots(dealt, work.new_tokens - 1, attention.ring, window, META).room
        for window in windows_of(work.hf_model.config, len(layers_of(work.hf_model)))
    }
    slots = sum(cache.slots[window].room for window in attention.windows)
    return _Seen(
        cache.nbytes / max(1, slots),
        rooms,
        live.peaks["layers"] - cache.nbytes,
        live.peaks["output"] - cache.nbytes,
        live.attention,
    )


@dataclass(frozen=True)
class _ShapeAttention(Attention):
    """Attention on shapes: of the first rank of a ring whose other ranks do not exist, with the tokens of the rank that
    holds most."""

    shape: tuple[int, int]
    live: LiveBytes
    heads: int

    @property
    def ring(self) -> Ring:
        return ShapeRing(*self.shape)

    def deal(self, length: int) -> Dealt:
        mine = super().deal(length)
        every = self.layout.positions(length + mine.padding, self.ring.world)
        return Dealt(every[int((every < length).sum(1).argmax())], length, mine.padding)

    def on_ring(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        padding: int,
        sinks: Tensor | None = None,
    ) -> Tensor:
        pattern, tokens = self.patterns[layer], q.shape[1] * self.ring.world
        call = shape_call(
            pattern, self.layout, self.shape, tokens, q.shape[0], self.heads, columns_of(pattern, tokens)
        )

        def prepare(index: Any) -> PreparedCall:
            return replace(call, index=copied(call.index))

        with self.live.in_attention():
            return attend_prepared(q, k, v, prepare, sinks=sinks)[0]
