"""One rank's part of the keys and values of a batch, and the attention that fills it and reads it.

The model's layers stay as they are. While something is attached, each attention module has another runtime:

* In *prefill* the ring runs on the prompt, as in training. This rank's keys and values stay where the layout put them.
* In *decode* the query of one new token a row attends to this rank's keys. Partial results merge over the ranks.

Keys of new tokens go to the ranks in turn. Every key in the cache stands before the query, so decoding needs no
positions: only how many keys of each row are here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mtraining.kernel import select_decode
from mtraining.layout import Layout
from mtraining.model.attention import attach
from mtraining.model.parallel import ParallelLM
from mtraining.model.support import attention_modules
from mtraining.pattern import Pattern
from mtraining.ring import Ring, merge_over_ring, sparse_ring_attention, with_sinks


@dataclass(frozen=True)
class Attention:
    """How prompts are read: each layer's pattern, who holds which tokens, on which ranks, by which kernel."""

    patterns: tuple[Pattern, ...]
    layout: Layout
    mesh: DeviceMesh | None
    kernel: str

    @property
    def ring(self) -> Ring:
        return Ring.over(self.mesh)

    def deal(self, length: int) -> Dealt:
        """Where the tokens of a sequence of ``length`` go once it is padded; no collective.

        Raises:
            UserError: the layout's stripes cut a pattern's blocks.
        """
        world = self.ring.world
        sizes = {pattern.block_size for pattern in self.patterns}
        multiple = math.lcm(*(self.layout.multiple(world, size) for size in sizes))
        padded = -(-length // multiple) * multiple
        return Dealt(self.layout.positions(padded, world)[self.ring.rank], length, padded - length)

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
        """Attention over a whole sequence; shapes as :func:`mtraining.ring.sparse_ring_attention` has them."""
        return sparse_ring_attention(
            q, k, v, pattern=self.patterns[layer], layout=self.layout, mesh=self.mesh, scale=scale,
            kernel=self.kernel, padding=padding, sinks=sinks,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Dealt:
    """This rank's part of a sequence that was padded at its end.

    Attributes:
        positions: int64 (local tokens,), global, ascending, on the CPU.
        length: real tokens of the whole sequence.
        padding: tokens added behind them.
    """

    positions: Tensor
    length: int
    padding: int

    @property
    def held(self) -> int:
        """Real tokens here; they come first."""
        return int((self.positions < self.length).sum())

    def slot(self, position: int) -> int | None:
        """Local place of a global position, None where another rank holds it."""
        found = (self.positions == position).nonzero()
        return int(found[0]) if len(found) else None

    def take(self, tokens: Tensor, filler: int) -> Tensor:
        """This rank's part of (length,) tokens: (1, local tokens), with ``filler`` for padding."""
        whole = torch.nn.functional.pad(tokens, (0, self.padding), value=filler)
        return whole[self.positions][None]


class Attends(Protocol):
    """What can be attached to a model: it computes every attention call of its forwards."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Shapes are those of :func:`mtraining.ring.sparse_ring_attention`."""
        ...


@dataclass(frozen=True)
class _LayerRuntime:
    """What hangs on one attention module while something is attached."""

    owner: Attends
    layer: int

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        return self.owner.attend(self.layer, q, k, v, scale, sinks)


@contextmanager
def attached(model: ParallelLM, owner: Attends) -> Iterator[None]:
    """Let ``owner`` compute the model's attention inside; its own settings are back afterwards.

    Layers that were compiled run eagerly meanwhile: a graph for each length of a prompt would cost more than it saves.
    """
    modules = [module for _, module in attention_modules(model.hf_model)]
    before: list[Any] = [module.mtraining_runtime for module in modules]
    with torch.compiler.set_stance("force_eager"):
        try:
            for layer, module in enumerate(modules):
                attach(module, _LayerRuntime(owner, layer))
            yield
        finally:
            for module, runtime in zip(modules, before, strict=True):
                attach(module, runtime)


@dataclass(frozen=True)
class Reading:
    """Attention over one padded sequence, of which nothing is kept."""

    attention: Attention
    dealt: Dealt

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: Tensor | None
    ) -> Tensor:
        return self.attention.on_ring(layer, q, k, v, scale, self.dealt.padding, sinks)


class Cache:
    """Keys and values of a batch of sequences, this rank's part of them.

    Call :meth:`prefill` before the forward over a prompt, and :meth:`next_token` before each forward over new tokens.
    A forward's attention calls are told apart by their order, since some layers attend more than once.

    Args:
        dealt: each row's prompt.
        new_tokens: that will be decoded at most.
    """

    def __init__(
        self, attention: Attention, dealt: Sequence[Dealt], new_tokens: int, device: torch.device
    ) -> None:
        self.attention, self.dealt, self._ring = attention, dealt, attention.ring
        self._counts = [one.held for one in dealt]  # keys of each row held here, as the host knows them
        self._room = max(self._counts) + -(-new_tokens // self._ring.world)
        self._rows = torch.arange(len(dealt), device=device)
        self._lengths = torch.tensor(self._counts, dtype=torch.int32, device=device)
        self._calls: list[tuple[Tensor, Tensor]] = []  # keys and values of each attention call of a forward
        self._call = 0
        self._row: int | None = None  # whose prompt is read; None: new tokens of all rows
        self._tokens = 0  # new tokens so far
        self._mine = False  # whether the new token's keys stay here

    @property
    def nbytes(self) -> int:
        """Bytes that the cache takes of this rank's device; known after the first prefill."""
        return sum(x.numel() * x.element_size() for pair in self._calls for x in pair)

    def prefill(self, row: int) -> None:
        """The next forward reads the prompt of ``row``."""
        self._row, self._call = row, 0

    def next_token(self) -> None:
        """The next forward is over one new token of every row."""
        self._row, self._call = None, 0
        self._mine = self._tokens % self._ring.world == self._ring.rank
        self._tokens += 1
        if self._mine:
            self._counts = [count + 1 for count in self._counts]
            self._lengths += 1
        self._places = self._lengths.long() - 1  # where this rank's new keys go

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: Tensor | None
    ) -> Tensor:
        call, self._call = self._call, self._call + 1
        if self._row is None:
            return self._decode(self._calls[call], q, k, v, scale, sinks)
        if call == len(self._calls):
            self._calls.append((self._empty(k), self._empty(v)))
        dealt = self.dealt[self._row]
        for kept, x in zip(self._calls[call], (k, v), strict=True):
            kept[self._row, : dealt.held] = x[0, : dealt.held]
        return self.attention.on_ring(layer, q, k, v, scale, dealt.padding, sinks)

    def _empty(self, x: Tensor) -> Tensor:
        """(batch, room, kv_heads, head_dim), a head's keys together in memory: long reads for one program."""
        _, _, kv_heads, dim = x.shape
        return x.new_empty(len(self.dealt), kv_heads, self._room, dim).transpose(1, 2)

    def _decode(
        self,
        cache: tuple[Tensor, Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of (batch, 1, q_heads, head_dim) over the keys of all ranks, the new ones included."""
        keys, values = cache
        if self._mine:
            keys[self._rows, self._places] = k[:, 0]
            values[self._rows, self._places] = v[:, 0]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        decode = select_decode(self.attention.kernel, q.device, q.dtype)
        out, lse = decode(q[:, 0], keys, values, self._lengths, max(self._counts), scale)
        # A sink is one key more, of one rank.
        if sinks is not None and self._ring.rank == 0:
            rows, row_lse = with_sinks(out[:, None], lse[..., None], sinks)
            out, lse = rows[:, 0], row_lse[..., 0]
        return merge_over_ring(out, lse, self._ring)[:, None].to(q.dtype)
