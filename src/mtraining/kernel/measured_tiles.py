"""Tile sizes that `mtraining bench tiles` measured on this machine: where they are kept, and what a run takes of them.

That command alone writes the file, and a process reads it once. So two ranks, or a run and its resumption, do not
choose for themselves: they read one file, and :func:`tiles_in_use` shows where they do not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from mtraining.errors import UserError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "MTRAINING_CACHE"
TILED_KERNELS = ("tiles_forward", "tiles_dq", "tiles_dkdv", "columns_forward", "columns_dq", "columns_dkdv")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TABLES = "tables"  # what is in use where nothing was measured: the entries of triton/tile_sizes.py
_EDGES = (16, 32, 64, 128)
_WARPS = (1, 2, 4, 8, 16)
_MOST_STAGES = 8
T = TypeVar("T")


class TileSizes(NamedTuple):
    """The piece of work of a kernel's inner loop, and what works on it.

    Attributes:
        block_m, block_n: queries and keys.
        warps, stages: how many warps and pipeline stages.
        tma: the copy engine (Hopper and Blackwell) fetches keys and values; it needs no registers for addresses.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False


class KernelCase(NamedTuple):
    """What tile sizes are measured for: a kernel, the dtype of q, the unpadded head_dim, and the index's block size."""

    kernel: str
    dtype: torch.dtype
    head_dim: int
    block_size: int


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu" and the machine's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"


def triton_version() -> str:
    """The installed Triton, "none" without."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def slug(gpu: str) -> str:
    """A GPU's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


def cache_folder() -> Path:
    """Where measurements of this machine are kept: ``MTRAINING_CACHE``, else in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get(CACHE_VARIABLE) or os.path.join(user, "mtraining"))


def tiles_path(device: torch.device) -> Path:
    """Where tiles for this GPU and Triton are kept."""
    return cache_folder() / f"tiles-{slug(device_name(device))}-triton-{triton_version()}.json"


@cache
def measured_tiles(device: torch.device) -> dict[KernelCase, TileSizes]:
    """What was measured on this very GPU with this very Triton; empty where nothing was. Read once a process.

    Raises:
        UserError: the file is damaged, or was edited into something no kernel takes.
    """
    path = tiles_path(device)
    document = read_tiles(path)
    if document is None:
        return {}
    here = (device_name(device), triton_version())
    if (document["gpu"], document["triton"]) != here:
        logger.warning(
            "kernel: %s is of %s and Triton %s, not of %s and Triton %s, so it is not used",
            path, document["gpu"], document["triton"], *here,
        )  # fmt: skip
        return {}
    logger.info("kernel: tiles from %s", path)
    return dict(_parse(entry) for entry in document["entries"])


def tiles_in_use(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """A fingerprint of the measured tiles that attention over such tensors takes; ``TABLES`` where it takes none.

    Raises:
        UserError: as :func:`measured_tiles`.
    """
    measured = measured_tiles(device)
    used = sorted(
        repr(item) for item in measured.items() if (item[0].dtype, item[0].head_dim) == (dtype, head_dim)
    )
    return hashlib.sha256("\n".join(used).encode()).hexdigest()[:12] if used else TABLES


def read_tiles(path: Path) -> dict[str, Any] | None:
    """A tiles file as it was written, checked; None where there is none.

    Raises:
        UserError: naming the file, what is wrong with it, and the remedy.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        for key in ("gpu", "triton"):
            _field(document, key, str)
        for entry in _field(document, "entries", list):
            _parse(entry)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"kernel: the tiles file {path} cannot be used ({error}); delete it, or run `mtraining bench tiles` again."
        ) from None
    return document


def entry_case(entry: dict[str, Any]) -> KernelCase:
    """What an entry of a file was measured for; ValueError where it does not say."""
    kernel, dtype = _field(entry, "kernel", str), _field(entry, "dtype", str)
    if kernel not in TILED_KERNELS or dtype not in DTYPES:
        raise ValueError(f"kernel {kernel!r} of {dtype!r} is not known")
    return KernelCase(kernel, DTYPES[dtype], _field(entry, "head_dim", int), _field(entry, "block_size", int))


def _parse(entry: Any) -> tuple[KernelCase, TileSizes]:
    call = entry_case(entry)
    chosen = _field(entry, "tiles", dict)
    kinds = {"block_m": int, "block_n": int, "warps": int, "stages": int, "tma": bool}
    tiles = TileSizes(**{name: _field(chosen, name, kind) for name, kind in kinds.items()})
    wrong = misfit(call.kernel, tiles, call.block_size)
    if wrong is not None:
        raise ValueError(f"{call.kernel}, head_dim {call.head_dim}: {wrong}")
    return call, tiles


def misfit(kernel: str, tiles: TileSizes, block_size: int) -> str | None:
    """Why no kernel takes these tiles with blocks of this size; None where one does."""
    columns = kernel.startswith("columns")
    for name, edge in (("block_m", tiles.block_m), ("block_n", tiles.block_n)):
        if edge not in _EDGES:
            return f"{name} is {edge}, not one of {_EDGES}"
        whole = name == "block_m" or not columns
        if whole and (block_size < 1 or block_size % edge):
            return f"{name} is {edge}, which does not divide blocks of {block_size}"
    if columns and tiles.block_n < 32:  # the bits of hidden columns are read by words
        return f"block_n is {tiles.block_n}, and columns take 32 at least"
    if tiles.warps not in _WARPS or not 1 <= tiles.stages <= _MOST_STAGES:
        return f"{tiles.warps} warps and {tiles.stages} stages are not in {_WARPS} and 1 to {_MOST_STAGES}"
    return "tma is for tiles_forward alone" if tiles.tma and kernel != "tiles_forward" else None


def _field(record: Any, name: str, kind: type[T]) -> T:
    value = record.get(name) if isinstance(record, dict) else None
    if type(value) is not kind:  # True is an int to isinstance
        raise ValueError(f"{name} is {value!r}, not {kind.__name__}")
    return value
