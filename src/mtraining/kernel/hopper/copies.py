"""The copy engine under the names that the installed Triton has for it: 3.6 and 3.9 differ.

``fetch_tile(descriptor, coordinates, barrier, shared)`` copies from global to shared memory, and
``send_tile(descriptor, coordinates, shared)`` back.
"""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

if hasattr(tma, "async_load"):
    fetch_tile, send_tile = tma.async_load, tma.async_store
else:
    fetch_tile, send_tile = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
