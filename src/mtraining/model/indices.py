"""What happens to the indices of a model's layers from step to step: refreshed or held, covered, and counted.

* *Refresh*: estimate anew at every forward (the paper), at every k-th step, or no more after some step.
* *Anneal*: steps that are dense, and budgets that shrink (anneal.py).
* *Coverage*: extra block diagonals that rotate with the step, so that every distance receives gradient within k steps.
* *Count*: which distances have received gradient, in this step and since training began.

A held index is that of one sequence, the first of its step, and every sequence of every replica is given it: an index
fits the text it was estimated on, so holding one means one for all. Documents of a packed sequence are bounded by the
starts of its own batch. It is in global coordinates, so any number
of ranks can go on from it: of block lists each rank holds its own rows, and a checkpoint holds all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mtraining.errors import UserError
from mtraining.kernel import SparseIndex, joined_where_alike
from mtraining.kernel.index import joined
from mtraining.model.anneal import Anneal
from mtraining.model.key_coverage import key_coverage, overlap, tiles_of_heads, unread_by_distance
from mtraining.pattern import Dense, Pattern, SequenceShard
from mtraining.ring import Ring

FAR_TOKENS = 32_768
# Of a block distance: some tile at it was computed; none was; no document is that long. The larger one counts.
_JOINED, _MISSED, _ABSENT = 2, 1, 0
_FORMS = "every_step, {every_n: k} or {frozen_at: step}"


@dataclass(frozen=True)
class Refresh:
    """When indices are estimated. Steps count from 1, as in the metrics.

    Attributes:
        every_n: estimate at steps 1, 1 + n, 1 + 2 n, ...; 1 is every step.
        frozen_at: estimate at every step up to this one, and hold its indices ever after.
    """

    every_n: int = 1
    frozen_at: int | None = None

    @staticmethod
    def parse(value: Refresh | str | Mapping[Any, int]) -> Refresh:
        """From ``every_step``, ``{every_n: k}`` or ``{frozen_at: step}``.

        Raises:
            UserError: anything else.
        """
        if isinstance(value, Refresh):
            return value
        if value == "every_step":
            return Refresh()
        if isinstance(value, Mapping) and len(value) == 1:
            key, number = next(iter(value.items()))
            if key in ("every_n", "frozen_at") and isinstance(number, int) and number >= 1:
                return Refresh(**{key: number})
        raise UserError(
            f"pattern.refresh: {value!r} is not known; use {_FORMS}, with a number of at least 1."
        )

    def estimates(self, step: int) -> bool:
        """Whether step ``step`` (from 1) estimates anew."""
        if self.frozen_at is not None:
            return step <= self.frozen_at
        return (step - 1) % self.every_n == 0

    def source(self, step: int) -> int:
        """The step whose indices a step that does not estimate uses."""
        return self.frozen_at if self.frozen_at is not None else step - (step - 1) % self.every_n

    @property
    def holds(self) -> bool:
        return self.frozen_at is not None or self.every_n > 1


class IndexMemory:
    """The indices of a model's layers over the steps of its training.

    Args:
        refresh: when to estimate.
        coverage: every block distance receives gradient within this many steps; 0 adds nothing.
        dp_mesh: the replicas, which must hold the same indices; None for one.
        cp_mesh: the ranks that share a sequence, and the rows of its block lists; None for one.
        anneal: which steps are dense, and how budgets shrink; None for neither.
    """

    def __init__(
        self,
        refresh: Refresh,
        coverage: int,
        dp_mesh: DeviceMesh | None,
        cp_mesh: DeviceMesh | None,
        anneal: Anneal | None = None,
    ) -> None:
        if coverage < 0:
            raise UserError(f"pattern.coverage={coverage} must be a number of steps, or 0 for none.")
        self.refresh, self.coverage = refresh, coverage
        self.anneal = anneal or Anneal()
        self._dp_mesh, self._cp_mesh = dp_mesh, cp_mesh
        self._step: int | None = None
        self._held: dict[int, SparseIndex] = {}
        self._held_step = 0
        self._fresh: dict[int, SparseIndex] = {}
        # uint8 (q_heads, num_blocks), of each block distance: _JOINED, _MISSED or _ABSENT. In this step, and so far.
        self._now: dict[int, Tensor] = {}
        self._ever: dict[int, Tensor] = {}
        # uint8 (bands, q_heads, keys), as `key_coverage` has it.
        self._keys_now: dict[int, Tensor] = {}
        self._keys_ever: dict[int, Tensor] = {}
        # Indices that are not counted yet: one a layer, of one micro-batch, with its starts.
        self._uncounted: dict[int, SparseIndex] = {}
        self._shard: SequenceShard | None = None
        # The first index of each layer, in this step and in the one before.
        self._used: dict[int, SparseIndex] = {}
        self._used_before: dict[int, SparseIndex] = {}

    @property
    def in_step(self) -> bool:
        return self._step is not None

    @property
    def steps_matter(self) -> bool:
        """Whether what a step computes depends on its number."""
        return self.refresh.holds or self.coverage > 0 or self.anneal.active

    @contextmanager
    def training_step(self, step: int) -> Iterator[None]:
        """The forwards and backwards of optimizer step ``step``, counted from 1. Collective over the replicas."""
        self._step = step
        self._fresh.clear()
        self._now.clear()
        self._keys_now.clear()
        self._uncounted.clear()
        self._used_before, self._used = self._used, {}
        try:
            yield
        finally:
            self._step = None
        self._count_all()
        for now, ever in ((self._now, self._ever), (self._keys_now, self._keys_ever)):
            _add(ever, {layer: seen if layer in ever else seen.clone() for layer, seen in now.items()})
        if self.refresh.holds and self.refresh.estimates(step):
            self._held, self._fresh = {n: self._from_first_replica(x) for n, x in self._fresh.items()}, {}
            self._held_step = step

    def wrap(self, layer: int, pattern: Pattern) -> Pattern:
        """``pattern`` for one layer, under this memory; `UserError` where it cannot be annealed as asked."""
        self.anneal.check(pattern)
        return Remembered(block_size=pattern.block_size, layer=layer, inner=pattern, memory=self)

    def held(self, layer: int, batch: int, shard: SequenceShard) -> SparseIndex | None:
        """The held index of a layer, for every sequence of a batch; None where this step estimates."""
        if self._step is None or self.refresh.estimates(self._step):
            return None
        wanted = self.refresh.source(self._step)
        index = self._held.get(layer)
        if index is None or self._held_step != wanted:
            raise UserError(
                f"pattern.refresh: step {self._step} needs the indices of step {wanted}, which this run does not hold "
                f"(it holds those of {self._held_step or 'no step'}); resume from a checkpoint of a run with the same "
                "pattern.refresh, or use every_step."
            )
        if index.seq_len != shard.seq_len:
            raise UserError(
                f"pattern.refresh: the held indices are for {index.seq_len} tokens and this batch has {shard.seq_len}; "
                "use one train.seq_len throughout, or pattern.refresh=every_step."
            )
        index = self._held[layer] = own_rows(index, shard)
        return replace(
            index,
            diagonals=index.diagonals.expand(batch, -1, -1).contiguous(),
            columns=index.columns.expand(batch, -1, -1).contiguous(),
            blocks=None if index.blocks is None else index.blocks.expand(batch, -1, -1, -1).contiguous(),
        )

    def pattern(self, inner: Pattern) -> Pattern:
        """A layer's pattern with the budgets of this step; outside of steps as it stands."""
        return inner if self._step is None else self.anneal.pattern(inner, self._step)

    @property
    def dense(self) -> bool:
        """Whether this step attends to everything, whatever it holds."""
        return self._step is not None and self.anneal.dense(self._step)

    def wants(self, layer: int) -> bool:
        """Whether later steps will use what a layer estimates next: it is the step's first, and is to be held."""
        held = self._step is not None and self.refresh.holds and self.refresh.estimates(self._step)
        return held and layer not in self._fresh

    def keep(self, layer: int, index: SparseIndex) -> None:
        """Remember a layer's index, if it is wanted."""
        if not self.wants(layer):
            return
        first = (index.diagonals[:1].clone(), index.columns[:1].clone())
        blocks = None if index.blocks is None else index.blocks[:1].clone()
        self._fresh[layer] = replace(index, diagonals=first[0], columns=first[1], blocks=blocks)

    def cover(self, index: SparseIndex) -> SparseIndex:
        """``index`` with this step's share of all block diagonals.

        Head h is given diagonals d with (d - h - step) divisible by ``coverage``: over that many steps every distance,
        and at any one step different distances in different heads, so that a striped ring stays balanced.
        """
        if self._step is None or not self.coverage:
            return index
        device = index.diagonals.device
        head = torch.arange(index.diagonals.shape[1], device=device)
        distance = torch.arange(index.num_blocks, device=device)
        extra = (distance - head[:, None] - self._step) % self.coverage == 0
        return replace(index, diagonals=index.diagonals | extra)

    def count(self, layer: int, index: SparseIndex, shard: SequenceShard) -> None:
        """Note which block distances and which keys of a layer receive gradient, and which its documents have.

        Of block lists each rank counts its own rows; :meth:`uncovered` and :meth:`unread` join what the ranks have.
        """
        if self._step is None:
            return
        if layer in self._uncounted:  # of the micro-batch before
            self._count_all()
        self._uncounted[layer], self._shard = replace(index, starts=shard.starts), shard
        if index.blocks is None:
            self._used.setdefault(layer, index)
        else:  # lists are large, so they are not held until all layers can be counted at once
            self._count_all()

    def _count_all(self) -> None:
        """Count what is not counted yet. Some fifty small kernels, whatever the number of layers that are alike."""
        for layers, index in joined_where_alike(self._uncounted):
            assert self._shard is not None
            distances = _distances(index, self._shard).unflatten(0, (len(layers), -1))
            keys = key_coverage(index, self._shard).unflatten(1, (len(layers), -1)).transpose(0, 1)
            _add(self._now, dict(zip(layers, distances.contiguous().unbind(), strict=True)))
            _add(self._keys_now, dict(zip(layers, keys.contiguous().unbind(), strict=True)))
        self._uncounted.clear()
        self._shard = None

    def moved(self) -> list[float]:
        """By layer, the share of the last step's index that was already in the index of the step before.

        :func:`mtraining.model.key_coverage.overlap` counts it, for the first sequence of the first replica. Empty
        before the second step since training began or went on, and where shapes differ. Patterns that list blocks have
        none, for their last index would be large to keep. Collective over the replicas.
        """
        pairs = [(self._used[n], self._used_before[n]) for n in sorted(self._used) if n in self._used_before]
        if not pairs or any(now.diagonals.shape[1:] != then.diagonals.shape[1:] for now, then in pairs):
            return []
        counts = _overlaps(pairs)
        if self._dp_mesh is not None:
            group = self._dp_mesh.get_group()
            dist.broadcast(counts, src=dist.get_global_rank(group, 0), group=group)
        return [round(share, 6) for share in (counts[:, 0] / counts[:, 1].clamp(min=1)).tolist()]

    def unread(self) -> dict[str, list[float]]:
        """Share of key positions that no query at a distance read, so that they got no gradient from there: in the last
        step and in all so far, by band (below 1K tokens, 1K to 4K, 4K to 32K, beyond). Collective over all ranks.
        """
        found = {
            "uncovered_by_distance": unread_by_distance(self._over_ranks(self._keys_now)),
            "uncovered_run_by_distance": unread_by_distance(self._over_ranks(self._keys_ever)),
        }
        return {name: shares for name, shares in found.items() if shares}

    def uncovered(self, seq_len: int) -> dict[str, float]:
        """Share of the block distances that no tile of a head joined: their pairs had no slash to bring a gradient.

        Means over layers and heads; columns, which reach any distance at a few keys, are left aside. Distances that no
        document has are not counted. Call it after a step; collective over all ranks.

        Returns:
            ``uncovered``: in the last step; ``uncovered_run``: ever since training began; and both again with ``_far``
            for distances beyond 32,768 tokens (half the sequence, where that is less). Empty when nothing was counted.
        """
        found: dict[str, float] = {}
        for name, by_layer in (("uncovered", self._now), ("uncovered_run", self._ever)):
            counted = list(self._over_ranks(by_layer).values())
            if counted:
                far = min(FAR_TOKENS, seq_len // 2) / seq_len
                beyond = [layer[:, int(far * layer.shape[1]) :] for layer in counted]
                found[name] = torch.stack([_missed(layer) for layer in counted]).mean().item()
                found[f"{name}_far"] = torch.stack([_missed(layer) for layer in beyond]).mean().item()
        return found

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep, on the CPU, the same on every rank. Collective over all ranks.

        Held block lists are whole there, which is quadratic in the number of blocks: 2 MiB a head at 512K tokens.
        """
        state = {"held_step": torch.tensor(self._held_step)}
        for layer, index in self._held.items():
            state[f"diagonals_{layer}"] = index.diagonals.to("cpu", torch.uint8)
            state[f"columns_{layer}"] = index.columns.cpu()
            state[f"shape_{layer}"] = torch.tensor([index.seq_len, index.block_size])
            if index.blocks is not None:
                blocks = index.whole(Ring.over(self._cp_mesh)).blocks
                assert blocks is not None
                state[f"blocks_{layer}"] = blocks.cpu()
        for layer, distances in self._over_ranks(self._ever).items():
            state[f"distances_{layer}"] = distances.cpu()
        for layer, keys in self._over_ranks(self._keys_ever).items():
            state[f"keys_{layer}"] = keys.cpu()
        return state

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from :meth:`state`."""
        self._held_step = int(state["held_step"])
        for name, tensor in state.items():
            kind, _, layer = name.rpartition("_")
            if kind == "distances":
                self._ever[int(layer)] = tensor.to(device)
            elif kind == "keys":
                self._keys_ever[int(layer)] = tensor.to(device)
            elif kind == "shape":
                seq_len, block_size = tensor.tolist()
                diagonals, columns = state[f"diagonals_{layer}"].bool(), state[f"columns_{layer}"]
                # all rows, and on the CPU, until held() knows which of them are this rank's
                blocks = state.get(f"blocks_{layer}")
                self._held[int(layer)] = SparseIndex(
                    seq_len, block_size, diagonals.to(device), columns.to(device), blocks,
                    dense=bool(diagonals.all()) and not columns.numel() and blocks is None,
                )  # fmt: skip

    def _from_first_replica(self, index: SparseIndex) -> SparseIndex:
        if self._dp_mesh is None:
            return index
        group = self._dp_mesh.get_group()
        diagonals, columns = index.diagonals.to(torch.uint8), index.columns.contiguous()
        blocks = None if index.blocks is None else index.blocks.contiguous()  # the same rows in every replica
        for tensor in (diagonals, columns, blocks):
            if tensor is not None:
                dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
        return replace(index, diagonals=diagonals.bool(), columns=columns, blocks=blocks)

    def _over_ranks(self, by_layer: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The largest value that any rank of any replica has, in each place: for each layer, uint8 of its shape."""
        layers = sorted(by_layer)
        ring = Ring.over(self._cp_mesh)
        if not layers or (ring.world == 1 and self._dp_mesh is None):
            return {layer: by_layer[layer].clone() for layer in layers}
        together = torch.cat([by_layer[layer].flatten() for layer in layers])
        if ring.world > 1:
            together = ring.all_gather(together).amax(0)
        if self._dp_mesh is not None:
            dist.all_reduce(together, op=dist.ReduceOp.MAX, group=self._dp_mesh.get_group())
        parts = together.split([by_layer[layer].numel() for layer in layers])
        return {layer: part.view(by_layer[layer].shape) for layer, part in zip(layers, parts, strict=True)}


def _add(so_far: dict[int, Tensor], more: Mapping[int, Tensor]) -> None:
    """Keep the larger value of each place, by layer; what has another shape than before begins anew, as it is."""
    old = [layer for layer, now in more.items() if layer in so_far and so_far[layer].shape == now.shape]
    if old:
        torch._foreach_maximum_([so_far[layer] for layer in old], [more[layer] for layer in old])
    so_far.update({layer: now for layer, now in more.items() if layer not in old})


def _overlaps(pairs: Sequence[tuple[SparseIndex, SparseIndex]]) -> Tensor:
    """(shared, all) scores of each pair of indices: float64 (pairs, 2)."""
    counts: dict[int, Tensor] = {}
    for places, now in joined_where_alike(dict(enumerate(now for now, _ in pairs))):
        then = [pairs[place][1] for place in places]
        if len({one.columns.shape for one in then}) == 1:
            found = overlap(now, joined(then)).unflatten(1, (len(places), -1)).sum(-1).T
        else:
            found = torch.stack([overlap(*pairs[place]).sum(-1) for place in places])
        counts.update(zip(places, found, strict=True))
    return torch.stack([counts[place] for place in range(len(pairs))])


def _missed(distances: Tensor) -> Tensor:
    """Share of the distances that exist which no tile joined; 0 where none exists."""
    return (distances == _MISSED).sum() / (distances != _ABSENT).sum().clamp(min=1)


def _distances(index: SparseIndex, shard: SequenceShard) -> Tensor:
    """Of each block distance of an index with its starts, for this rank's rows: uint8 (q_heads, num_blocks)."""
    distance = torch.arange(index.num_blocks, device=index.diagonals.device)
    reach = distance.expand(index.diagonals.shape[0], -1)
    if index.starts is not None:
        reach = reach - index.first_blocks
    exists = distance <= reach.amax(1)[:, None]  # (batch, num_blocks)
    if index.blocks is None:
        joined = (index.diagonals & exists[:, None]).any(0)
    else:
        own = shard.all_blocks(index.block_size)[shard.comm.rank]
        key = own[:, None] - distance
        joined = torch.cat([_joined(tiles.any(0), key) for tiles in tiles_of_heads(index, own, distance)])
    return torch.where(joined, _JOINED, torch.where(exists.any(0), _MISSED, _ABSENT)).to(torch.uint8)


def _joined(tiles: Tensor, key: Tensor) -> Tensor:
    """Distances at which some tile of a rank's query blocks is selected: bool (heads, num_blocks).

    Args:
        tiles: bool (heads, rows, num_blocks), those selected.
        key: int64 (rows, num_blocks), the key block at each distance of each row; negative where there is none.
    """
    return (tiles.gather(2, key.clamp(min=0).expand_as(tiles)) & (key >= 0)).any(1)


def own_rows(index: SparseIndex, shard: SequenceShard) -> SparseIndex:
    """A restored index with this rank's rows of its block lists, on the device of the rest; others as they are."""
    if index.blocks is None or index.block_rows is not None:
        return index
    device = index.diagonals.device
    if shard.comm.world == 1:
        return replace(index, blocks=index.blocks.to(device))
    rows = shard.all_blocks(index.block_size)[shard.comm.rank]
    mine = index.blocks[:, :, rows.to(index.blocks.device)]
    return replace(index, blocks=mine.to(device), block_rows=rows)


@dataclass(frozen=True, eq=False)
class Remembered(Pattern):
    """A layer's pattern under an :class:`IndexMemory`; outside a training step it is the inner pattern alone."""

    layer: int = 0
    inner: Pattern = Pattern()  # noqa: RUF009 - frozen
    memory: IndexMemory = None  # type: ignore[assignment]

    name = "remembered"

    def estimate(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        if self.memory.dense:
            if self.memory.wants(self.layer):
                self.memory.keep(self.layer, self._estimated(q, k, shard, scale))
            index = Dense(block_size=self.block_size).estimate(q, k, shard, scale)
            self.memory.count(self.layer, index, shard)
            return index
        found = self.memory.held(self.layer, q.shape[0], shard)
        index = self._estimated(q, k, shard, scale) if found is None else found
        if found is None:
            self.memory.keep(self.layer, index)
        index = self.memory.cover(index)
        self.memory.count(self.layer, index, shard)
        return index

    def _estimated(self, q: Tensor, k: Tensor, shard: SequenceShard, scale: float) -> SparseIndex:
        return self.memory.pattern(self.inner).estimate(q, k, shard, scale)
