"""One rank's part of the keys and values of a batch, and the attention that fills it and reads it.

The model's layers stay as they are. While something is attached, each attention module has another runtime:

* In *prefill* the ring runs on the prompt, as in training. This rank's keys and values stay where the layout put them.
* In *decode* the query of one new token a row attends to this rank's keys. Partial results merge over the ranks.

Keys of new tokens go to the ranks in turn. Every key in the cache stands before the query, so full attention needs no
positions in decode: only how many keys of each row are here. Of a layer with a window, the cache leaves out what no new
token reaches of the prompt. The positions of its keys tell which of them a query still sees.
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

from mtraining.kernel import Window, first_keys, reach_of, select_decode
from mtraining.layout import Layout
from mtraining.model.attention import attach
from mtraining.model.parallel import ParallelLM
from mtraining.model.support import attention_modules
from mtraining.pattern import Pattern
from mtraining.ring import Ring, merge_over_ring, sparse_ring_attention, with_sinks


@dataclass(frozen=True)
class Attention:
    """How prompts are read: pattern and window of each layer, who holds which tokens, on which ranks, which kernel."""

    patterns: tuple[Pattern, ...]
    windows: tuple[Window | None, ...]
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
            kernel=self.kernel, padding=padding, window=self.windows[layer], sinks=sinks,
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


class Slots:
    """Where a rank's keys stand in the cache, of all layers with one window: in global order, the new tokens' last.

    Args:
        dealt: each row's prompt.
        new_tokens: that will be decoded at most.
        ring: whose ranks keep the new tokens' keys in turn.
        window: None for layers with full attention.

    Attributes:
        skipped: of each row, how many of the prompt's keys that are held here no new token can reach.
        room: slots of a row.
        lengths: int32 (batch,), slots in use.
        places: int64 (batch,), where this rank's newest keys are.
        firsts: int32 (batch,), the first slot that the newest query attends to; None for 0.
        longest: upper bound of the slots that it attends to, as the host knows it.
    """

    def __init__(
        self, dealt: Sequence[Dealt], new_tokens: int, ring: Ring, window: Window | None, device: torch.device
    ) -> None:
        self._window, self._dealt = window, dealt
        ends = torch.tensor([one.length for one in dealt])
        first = torch.zeros_like(ends) if window is None else first_keys(ends, window)
        self.skipped = [
            int((one.positions < at).sum()) for one, at in zip(dealt, first.tolist(), strict=True)
        ]
        self._counts = [one.held - skip for one, skip in zip(dealt, self.skipped, strict=True)]
        new = max(0, -(-new_tokens // ring.world))
        self.room = max(self._counts) + new
        self.lengths = torch.tensor(self._counts, dtype=torch.int32, device=device)
        self.places = self.lengths.long() - 1
        self.firsts: Tensor | None = None
        if window is None:
            return
        # Global positions by slot, known from the start: new tokens follow the prompt, dealt in turn.
        positions = torch.full((len(dealt), self.room), torch.iinfo(torch.int64).max)
        turns = torch.arange(new) * ring.world + ring.rank
        for row, (one, skip, count) in enumerate(zip(dealt, self.skipped, self._counts, strict=True)):
            positions[row, :count] = one.positions[skip : one.held]
            positions[row, count : count + new] = one.length + turns
        self._positions, self._ends = positions.to(device), ends.to(device)

    @property
    def longest(self) -> int:
        most = max(self._counts)
        return most if self._window is None else min(most, reach_of(self._window))

    def next_token(self, number: int, mine: bool) -> None:
        """The query of new token ``number`` comes, from 0; ``mine``: its keys stay on this rank."""
        if mine:
            self._counts = [count + 1 for count in self._counts]
            self.lengths += 1
        self.places = self.lengths.long() - 1
        if self._window is not None:
            first = first_keys(self._ends + number, self._window)
            self.firsts = torch.searchsorted(self._positions, first[:, None], out_int32=True)[:, 0]


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
        self.slots = {
            window: Slots(dealt, new_tokens, self._ring, window, device) for window in set(attention.windows)
        }
        self._rows = torch.arange(len(dealt), device=device)
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
        for slots in self.slots.values():
            slots.next_token(self._tokens, self._mine)
        self._tokens += 1

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: Tensor | None
    ) -> Tensor:
        call, self._call = self._call, self._call + 1
        slots = self.slots[self.attention.windows[layer]]
        if self._row is None:
            return self._decode(self._calls[call], slots, q, k, v, scale, sinks)
        if call == len(self._calls):
            self._calls.append((self._empty(k, slots.room), self._empty(v, slots.room)))
        dealt, skipped = self.dealt[self._row], slots.skipped[self._row]
        for kept, x in zip(self._calls[call], (k, v), strict=True):
            kept[self._row, : dealt.held - skipped] = x[0, skipped : dealt.held]
        return self.attention.on_ring(layer, q, k, v, scale, dealt.padding, sinks)

    def _empty(self, x: Tensor, room: int) -> Tensor:
        """(batch, room, kv_heads, head_dim), a head's keys together in memory: long reads for one program."""
        _, _, kv_heads, dim = x.shape
        return x.new_empty(len(self.dealt), kv_heads, room, dim).transpose(1, 2)

    def _decode(
        self,
        cache: tuple[Tensor, Tensor],
        slots: Slots,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of (batch, 1, q_heads, head_dim) over the keys of all ranks, the new ones included."""
        keys, values = cache
        if self._mine:
            keys[self._rows, slots.places] = k[:, 0]
            values[self._rows, slots.places] = v[:, 0]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        decode = select_decode(self.attention.kernel, q.device, q.dtype)
        out, lse = decode(q[:, 0], keys, values, slots.lengths, slots.longest, scale, slots.firsts)
        # A sink is one key more, of one rank.
        if sinks is not None and self._ring.rank == 0:
            rows, row_lse = with_sinks(out[:, None], lse[..., None], sinks)
            out, lse = rows[:, 0], row_lse[..., 0]
        return merge_over_ring(out, lse, self._ring)[:, None].to(q.dtype)
