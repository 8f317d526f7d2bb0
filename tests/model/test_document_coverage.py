"""Which block distances packed documents have, and which of them no tile joins: counted one by one."""

from __future__ import annotations

import pytest
import torch

from document_cases import PACKED, TOKENS, pattern_of
from mtraining.model.indices import IndexMemory, Refresh
from mtraining.pattern import SequenceShard
from pattern_cases import SIZE
from starts_cases import of_window

BLOCKS = TOKENS // SIZE


@pytest.mark.parametrize("packed", [*PACKED, "window", "none"])
@pytest.mark.parametrize("name", ["top_k", "by block", "moba", "a_shape", "toeplitz_random", "dense"])
def test_uncovered_distances_are_those_of_the_documents(name: str, packed: str) -> None:
    made = torch.Generator().manual_seed(1)
    q = 2 * torch.randn(2, TOKENS, 4, 16, generator=made, dtype=torch.float64)
    k = torch.randn(2, TOKENS, 2, 16, generator=made, dtype=torch.float64)
    starts = {"window": of_window(TOKENS, 30, 2), "none": None, **PACKED}[packed]
    shard = SequenceShard.whole(TOKENS).of_batch(starts=starts, packed=packed != "window")
    index = pattern_of(name).estimate(q, k, shard, 0.25)
    memory = IndexMemory(Refresh(), 0, None, None)
    with memory.training_step(1):
        memory.count(0, index, shard)

    first = (torch.zeros(2, TOKENS) if starts is None else starts)[:, ::SIZE].long() // SIZE
    tiles = {
        key: tiles for *key, tiles in ([b, h, t] for b, h, t in index.tiles_by_head()) for key in [tuple(key)]
    }
    missed, exist, far_missed, far_exist = 0, 0, 0, 0
    for head in range(4):
        for distance in range(BLOCKS):
            pairs = [
                (b, i) for b in range(2) for i in range(distance, BLOCKS) if i - distance >= int(first[b, i])
            ]
            if not pairs:
                continue
            joined = any(bool(tiles[b, head][i, i - distance]) for b, i in pairs)
            exist, missed = exist + 1, missed + (not joined)
            if distance >= BLOCKS // 2:
                far_exist, far_missed = far_exist + 1, far_missed + (not joined)
    found = memory.uncovered(TOKENS)
    assert found["uncovered"] == found["uncovered_run"] == pytest.approx(missed / exist)
    assert found["uncovered_far"] == pytest.approx(far_missed / max(far_exist, 1))
    if packed == "one" and name in ("top_k", "by block"):
        assert 0 < missed < exist, "all or nothing would test little"


def test_distances_of_other_steps_are_remembered() -> None:
    """A distance that a later step's documents lack still counts as missed in the run."""
    memory = IndexMemory(Refresh(), 0, None, None)
    pattern, q = pattern_of("a_shape"), torch.randn(2, TOKENS, 4, 16)
    for step, packed in ((1, "one"), (2, "at blocks")):
        shard = SequenceShard.whole(TOKENS).of_batch(starts=PACKED[packed])
        with memory.training_step(step):
            memory.count(0, pattern.estimate(q, q[:, :, :2], shard, 0.25), shard)
    found = memory.uncovered(TOKENS)
    again = IndexMemory(Refresh(), 0, None, None)
    again.restore(memory.state(), torch.device("cpu"))
    # Sinks are tiles up to a document's length: 12 blocks in the second step, where no document has more. The first
    # step has documents of 15, which join only the window's distances.
    assert found["uncovered"] == 0 and found["uncovered_run"] == 3 / 16
    assert again.uncovered(TOKENS) == {name: x for name, x in found.items() if "run" in name}
