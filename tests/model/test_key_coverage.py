"""Coverage of keys by distance and stability of indices, against masks written out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distributed import ProcessPool, Worker
from mtraining.kernel import SparseIndex, select_backend
from mtraining.kernel.index import pack_blocks
from mtraining.layout import build_layout
from mtraining.model import key_coverage as room
from mtraining.model.indices import IndexMemory, Refresh, own_rows
from mtraining.model.key_coverage import ABSENT, READ, UNREAD, key_coverage, overlap, unread_by_distance
from mtraining.pattern import SequenceShard
from mtraining.ring import Ring
from mtraining.ring.plan import make_plan

TOKENS, BLOCK, HEADS = 64, 8, 3
BANDS = (0, 5, 20, 40)


@pytest.fixture(autouse=True)
def short_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BAND_STARTS", BANDS)


def shard_of(starts: Tensor | None = None) -> SequenceShard:
    return SequenceShard.whole(TOKENS).of_batch(starts=starts)


def random_index(seed: int, listed: bool = False, batch: int = 2, rate: float = 0.25) -> SparseIndex:
    generator = torch.Generator().manual_seed(seed)
    blocks = TOKENS // BLOCK
    diagonals = torch.rand(batch, HEADS, blocks, generator=generator) < rate
    columns = (
        torch.randint(TOKENS + 1, (batch, HEADS, 4), generator=generator, dtype=torch.int32).sort(-1).values
    )
    packed = None
    if listed:
        packed = pack_blocks(torch.rand(batch, HEADS, blocks, blocks, generator=generator) < rate)
    return SparseIndex(TOKENS, BLOCK, diagonals, columns, packed)


def documents(batch: int) -> Tensor:
    """Starts of two documents in each sequence, cut at another place."""
    starts = torch.zeros(batch, TOKENS, dtype=torch.int32)
    for row in range(batch):
        starts[row, 19 + 13 * row :] = 19 + 13 * row
    return starts


def mask_of(index: SparseIndex) -> Tensor:
    """Every (query, key) that is computed: bool (batch, heads, tokens, tokens)."""
    every = torch.arange(TOKENS // BLOCK)
    mask = index.tile_mask(every, every).repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
    for batch in range(mask.shape[0]):
        for head in range(HEADS):
            columns = index.columns[batch, head]
            mask[batch, head][:, columns[columns < TOKENS].long()] = True
    query, key = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    allowed = key <= query
    if index.starts is not None:
        allowed = allowed & (key >= index.starts[:, None, :, None])
    return mask & allowed


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_coverage_is_what_the_written_out_mask_says(listed: bool, packed: bool, seed: int) -> None:
    index = random_index(seed, listed)
    starts = documents(2) if packed else None
    index = replace(index, starts=starts)
    found = key_coverage(index, shard_of(starts))
    mask = mask_of(index)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    lowest = torch.zeros(2, 1, TOKENS, 1) if starts is None else starts[:, None, :, None]
    exists = (torch.arange(TOKENS) >= lowest).expand(2, 1, TOKENS, TOKENS)
    for place, (begin, end) in enumerate(zip(BANDS, (*BANDS[1:], TOKENS), strict=True)):
        band = (distance >= begin) & (distance < end)
        read = (mask & band).any(2).any(0)
        there = (exists & band).any(2).any(0).expand(HEADS, -1)
        expected = torch.where(read, READ, torch.where(there, UNREAD, ABSENT))
        assert torch.equal(found[place].long(), expected), place
    assert {READ, UNREAD, ABSENT} <= set(found.unique().tolist())


def test_shares_are_of_keys_that_have_a_query_there() -> None:
    layer = torch.tensor([[[READ, UNREAD, ABSENT, UNREAD]], [[ABSENT] * 4]], dtype=torch.uint8)
    full = torch.full_like(layer, READ)
    assert unread_by_distance({0: layer, 1: full}) == pytest.approx([1 / 3, 0])
    assert unread_by_distance({}) == []


@pytest.mark.parametrize("seed", range(3))
def test_overlap_counts_scores(seed: int) -> None:
    now, then = random_index(seed, batch=1), random_index(seed + 10, batch=1)
    shared = total = 0
    blocks = TOKENS // BLOCK
    for head in range(HEADS):
        for distance in range(blocks):
            scores = (blocks - distance) * BLOCK * BLOCK
            total += scores * bool(now.diagonals[0, head, distance])
            shared += scores * bool(now.diagonals[0, head, distance] and then.diagonals[0, head, distance])
        mine, other = (set(one.columns[0, head].tolist()) - {TOKENS} for one in (now, then))
        total += sum(TOKENS - column for column in mine)
        shared += sum(TOKENS - column for column in mine & other)
    assert overlap(now, then).sum(-1).tolist() == [shared, total]
    assert torch.equal(*overlap(now, now))


def counted_job(
    worker: Worker,
    grid: tuple[int, int],
    state: dict[str, Tensor] | None,
    steps: tuple[int, ...],
    listed: bool,
) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Count two layers of two sequences a step on (replicas, ranks of a sequence): the state, and shares so far."""
    dp, cp = grid
    mesh = worker.mesh((dp, cp), ("dp", "cp"))
    memory = IndexMemory(Refresh(), 0, mesh["dp"] if dp > 1 else None, mesh["cp"] if cp > 1 else None)
    if state is not None:
        memory.restore(state, worker.device)
    ring = Ring.over(mesh["cp"])
    backend = select_backend("reference", worker.device, torch.float32, 16)
    shard = make_plan(ring, build_layout("striped", BLOCK), TOKENS, BLOCK, worker.device).shard(backend)
    with patch.object(room, "BAND_STARTS", BANDS):
        for step in steps:
            with memory.training_step(step):
                for sequence in range(mesh.get_local_rank("dp"), 2, dp):
                    for layer in (0, 1):
                        seed = 100 * step + 10 * sequence + layer
                        memory.count(layer, own_rows(random_index(seed, listed, 1, 0.06), shard), shard)
        shares = memory.unread()["uncovered_run_by_distance"]
    return memory.state(), shares, [memory.uncovered(TOKENS)["uncovered_run"]]


@pytest.mark.parametrize("listed", [False, True], ids=["slashes", "lists"])
@pytest.mark.parametrize(("before", "after"), [((1, 1), (1, 1)), ((1, 2), (2, 1)), ((2, 2), (1, 2))], ids=str)
def test_what_was_covered_goes_on_on_any_grid(
    pool: ProcessPool, before: tuple[int, int], after: tuple[int, int], listed: bool
) -> None:
    """Two steps, a checkpoint, two more steps: the shares over the run are those of four steps on one process."""
    ((_, *whole),) = pool.run(
        counted_job, world=1, grid=(1, 1), state=None, steps=(1, 2, 3, 4), listed=listed
    )
    ((_, *half),) = pool.run(counted_job, world=1, grid=(1, 1), state=None, steps=(3, 4), listed=listed)
    first = pool.run(
        counted_job, world=before[0] * before[1], grid=before, state=None, steps=(1, 2), listed=listed
    )
    assert all(torch.equal(one[name], first[0][0][name]) for one, *_ in first for name in first[0][0]), (
        "ranks save the same"
    )
    for _, *shares in pool.run(
        counted_job, world=after[0] * after[1], grid=after, state=first[-1][0], steps=(3, 4), listed=listed
    ):
        assert shares == whole
    assert all(0 < share < lost for share, lost in zip(whole[0], half[0], strict=True)), (
        "else little is tested"
    )


class Operations(TorchDispatchMode):
    """Counts what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_many_layers_are_counted_with_the_operations_of_one() -> None:
    """Every step pays for it. No operation reads a value, so the host waits for nothing."""

    def operations(layers: int) -> int:
        memory, counted = IndexMemory(Refresh(), 0, None, None), Operations()
        for step in (1, 2):
            indices = [random_index(10 * step + layer) for layer in range(layers)]
            with counted if step == 2 else nullcontext(), memory.training_step(step):
                for layer, index in enumerate(indices):
                    memory.count(layer, index, shard_of())
        assert len(memory._keys_ever) == layers
        return counted.count

    assert operations(6) - 6 <= operations(2) <= 60
