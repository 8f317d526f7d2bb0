"""What a cache keeps of a layer with a window, and which of its keys a new token attends to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mtraining.generate.cache import Dealt, Slots
from mtraining.kernel import Chunks, Window
from mtraining.layout import build_layout
from mtraining.ring import Ring

LENGTHS, NEW, BLOCK = (29, 5, 50, 1), 9, 4


def first_of(query: int, window: Window | None) -> int:
    if window is None:
        return 0
    return (
        query // window.tokens * window.tokens if isinstance(window, Chunks) else max(query - window + 1, 0)
    )


@pytest.mark.parametrize("window", [None, 1, 2, 7, 30, 100, Chunks(1), Chunks(7), Chunks(30)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_new_token_sees_the_keys_of_its_window(world: int, layout: str, window: Any) -> None:
    dealt_by = build_layout(layout, BLOCK)
    multiple = dealt_by.multiple(world, BLOCK)
    for rank in range(world):
        dealt = []
        for length in LENGTHS:
            padded = -(-length // multiple) * multiple
            dealt.append(Dealt(dealt_by.positions(padded, world)[rank], length, padded - length))
        ring: Any = SimpleNamespace(rank=rank, world=world)
        slots = Slots(dealt, NEW, ring, window, torch.device("cpu"))
        # By slot, the global position that was written there.
        written = [
            one.positions[skip : one.held].tolist() for one, skip in zip(dealt, slots.skipped, strict=True)
        ]
        for number in range(NEW):
            slots.next_token(number, number % world == rank)
            for row, length in enumerate(LENGTHS):
                if number % world == rank:
                    assert int(slots.places[row]) == len(written[row]) < slots.room
                    written[row].append(length + number)
                first = 0 if slots.firsts is None else int(slots.firsts[row])
                seen = written[row][first : int(slots.lengths[row])]
                query = length + number
                keys = {*dealt[row].positions[: dealt[row].held].tolist()}
                keys |= {length + other for other in range(number + 1) if other % world == rank}
                assert seen == sorted(key for key in keys if key >= first_of(query, window))
                assert len(seen) <= slots.longest


def test_a_cache_holds_no_keys_out_of_reach() -> None:
    dealt = [Dealt(torch.arange(64), 60, 4)]
    rooms = {
        window: Slots(dealt, 3, Ring.over(None), window, torch.device("cpu")).room
        for window in (None, 8, Chunks(50))
    }
    assert rooms == {None: 63, 8: 7 + 3, Chunks(50): 10 + 3}
