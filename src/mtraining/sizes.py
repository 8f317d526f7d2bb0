"""Numbers of bytes in words."""

from __future__ import annotations

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def size_text(size: float) -> str:
    """A number of bytes in the largest unit of which there is at least one: 512 bytes, 3.50 MiB, 79.2 GiB."""
    for unit, bytes_in_it in _UNITS:
        number = size / bytes_in_it
        if number >= 1:
            return f"{number:.1f} {unit}" if number >= 10 else f"{number:.2f} {unit}"
    return f"{size:.0f} bytes"
