"""Which pieces of text share a sequence: best fit within a look-ahead window."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int, look_ahead: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack pieces into sequences of at most ``capacity`` tokens; no piece is cut.

    Pieces wait in a window of ``look_ahead`` places, filled in the order given. A sequence begins with the longest
    piece that waits. Then it takes, again and again, the longest that still fits. It is closed when none does. Of
    equal lengths the earlier piece goes first, so the result is a function of the arguments alone.

    Args:
        lengths: int64 (n,), tokens of each piece, each in 1..capacity.
        look_ahead: pieces that wait at one time, at least 1.

    Returns:
        order: int64 (n,), the pieces, sequence after sequence.
        ends: int64 (sequences,): sequence i holds the pieces order[ends[i - 1] : ends[i]].
    """
    count = len(lengths)
    # Sorted by length, and by lateness among equals: the last key below a length is the earliest of the longest.
    coming = (lengths.astype(np.int64) * count + np.arange(count - 1, -1, -1)).tolist()
    waiting = sorted(coming[:look_ahead])
    arrived = len(waiting)
    order: list[int] = []
    ends: list[int] = []
    while waiting:
        room = capacity
        while (place := bisect_left(waiting, (room + 1) * count) - 1) >= 0:
            length, lateness = divmod(waiting.pop(place), count)
            order.append(count - 1 - lateness)
            room -= length
            if arrived < count:
                insort(waiting, coming[arrived])
                arrived += 1
        ends.append(len(order))
    return np.array(order, dtype=np.int64), np.array(ends, dtype=np.int64)
