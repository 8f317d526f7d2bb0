"""Numbers of bytes and of tokens, as people write them."""

from __future__ import annotations

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def size_text(size: float) -> str:
    """A number of bytes in the largest unit of which there is at least one: 512 bytes, 3.50 MiB, 79.2 GiB."""
    for unit, bytes_in_it in _UNITS:
        number = size / bytes_in_it
        if number >= 1:
            return f"{number:.1f} {unit}" if number >= 10 else f"{number:.2f} {unit}"
    return f"{size:.0f} bytes"


def tokens_text(count: int) -> str:
    """A number of tokens in whole M or K, of 1024 each, where it is one: 524288 is 512K, 1000 stays 1000."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if count >= size and count % size == 0:
            return f"{count // size}{unit}"
    return str(count)
