"""Numbers of bytes in words."""

from __future__ import annotations


def size_text(size: float) -> str:
    """A number of bytes in the largest unit of which there is at least one: 512 bytes, 3.50 MiB, 79.20 GiB."""
    for unit, bytes_in_it in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= bytes_in_it:
            return f"{size / bytes_in_it:.2f} {unit}"
    return f"{size:.0f} bytes"
