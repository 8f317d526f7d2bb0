"""Measured rates of a GPU and of its links: what a prediction of time is made from.

A rates file is JSON, as `mtraining bench rates` writes it. Files in the folder `rates` beside this module are of GPUs
that were measured here; their `sources` name the measurement of each number.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import cache_folder, slug

BUILT_IN = Path(__file__).parent / "rates"
REMEDY = (
    "measure them there with `mtraining bench rates --out FILE` and give --rates FILE, or plan for a GPU measured "
    "here"
)
_RATE = re.compile(r"([0-9.]+) ?(GB|MB|TB)/s(?:[,+ ]+([0-9.]+) ?(us|ms))?", re.IGNORECASE)
_BYTES = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
_SECONDS = {"us": 1e-6, "ms": 1e-3}


@dataclass(frozen=True)
class Link:
    """One GPU's link in one direction: (bytes, seconds) of single messages, ascending; between them time is linear."""

    points: tuple[tuple[float, float], ...]

    @staticmethod
    def of_rate(bytes_per_second: float, latency: float = 0.0) -> Link:
        """latency + bytes / rate."""
        return Link(((0.0, latency), (bytes_per_second, 1.0 + latency)))

    @staticmethod
    def parse(text: str, option: str) -> Link:
        """``25GB/s``, or with a latency ``25GB/s,20us``.

        Raises:
            UserError: neither.
        """
        found = _RATE.fullmatch(text.strip())
        if found is None or not float(found[1]) > 0:
            raise UserError(
                f"{option}: {text!r} is no rate of a link; use for example 25GB/s, or 25GB/s,20us with a latency."
            )
        latency = float(found[3]) * _SECONDS[found[4].lower()] if found[3] else 0.0
        return Link.of_rate(float(found[1]) * _BYTES[found[2].upper()], latency)

    def seconds(self, size: float) -> float:
        """For a message of ``size`` bytes. Below the smallest measured one it takes as long as that one."""
        if len(self.points) == 1 or size <= self.points[0][0]:
            return self.points[0][1]
        sizes = [point[0] for point in self.points]
        above = min(max(bisect_right(sizes, size), 1), len(sizes) - 1)
        (a, low), (b, high) = self.points[above - 1], self.points[above]
        return low + (size - a) * (high - low) / (b - a)

    @property
    def bytes_per_second(self) -> float:
        """Of long messages."""
        (a, low), (b, high) = self.points[-2], self.points[-1]
        return (b - a) / (high - low)


@dataclass(frozen=True)
class AttentionRates:
    """Nanoseconds (forward, backward) of attention kernels at one head_dim, of one query head.

    Attributes:
        tile_ns: a selected tile of 128 x 128.
        row_ns: a block row of a pass, on top of its tiles: prologue and epilogue.
        column_ns: the area of a tile in columns.
        dense_ns: a causal tile of the dense kernel.
    """

    tile_ns: tuple[float, float]
    row_ns: tuple[float, float]
    column_ns: tuple[float, float]
    dense_ns: tuple[float, float]


@dataclass(frozen=True)
class Rates:
    """What was measured of one kind of GPU.

    Attributes:
        gpu: its name, as PyTorch gives it.
        memory_gib: its memory.
        matmul_tflops: products of decoder layers.
        memory_gb_per_s: reading and writing its memory, over both.
        attention: by head_dim.
        logit_ps: picoseconds of one logit of the loss besides its products, by ``fused``.
        around_gb_per_s: norms, rotary positions, gated MLP and sums: the traffic that they need, over their time, by
            ``fused``.
        estimate_ns: estimation of an index, for each local token and query head.
        host_gb_per_s: copies to pinned host memory; None where not measured.
        intra, inter: links inside a node and between nodes; None where not measured.
        sources: where each number is from.
    """

    gpu: str
    memory_gib: float
    matmul_tflops: float
    memory_gb_per_s: float
    attention: Mapping[int, AttentionRates]
    logit_ps: Mapping[str, float]
    around_gb_per_s: Mapping[str, float]
    estimate_ns: float
    host_gb_per_s: float | None
    intra: Link | None
    inter: Link | None
    sources: Mapping[str, str]

    def attention_at(self, head_dim: int) -> AttentionRates:
        """
        Raises:
            UserError: attention was not measured at this head_dim.
        """
        if head_dim not in self.attention:
            raise UserError(
                f"plan: attention at head_dim {head_dim} was not measured on {self.gpu}, only at "
                f"{', '.join(map(str, self.attention))}; {REMEDY}."
            )
        return self.attention[head_dim]

    def around(self, fused: str) -> tuple[float, float]:
        """(seconds of a logit, bytes per second around attention) under this ``fused``.

        Raises:
            UserError: it was not measured.
        """
        if fused not in self.logit_ps or fused not in self.around_gb_per_s:
            raise UserError(
                f"plan: fused={fused} was not measured on {self.gpu}, only {', '.join(self.logit_ps)}; choose one of "
                f"those, or {REMEDY}."
            )
        return 1e-12 * self.logit_ps[fused], 1e9 * self.around_gb_per_s[fused]


def read_rates(path: Path) -> Rates:
    """A rates file.

    Raises:
        UserError: no such file, or no rates in it.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return _rates(given)
    except OSError as error:
        raise UserError(f"rates: {path} cannot be read ({error.strerror}); {REMEDY}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"rates: {path} is no rates file ({type(error).__name__}: {error}); write one with `mtraining bench rates`."
        ) from None


def built_in() -> dict[str, Path]:
    """The files that come with the package, by short name."""
    return {path.stem: path for path in sorted(BUILT_IN.glob("*.json"))}


def own_path(gpu: str) -> Path:
    """Where this user's rates of a GPU are kept, beside measured tiles."""
    return cache_folder() / f"rates-{slug(gpu)}.json"


def rates_of(gpu: str) -> Rates:
    """Rates of a GPU by its short name, such as h200: the user's own if there are any, else those of the package.

    The user's own are found by the short name of the package too: h100 is the NVIDIA H100 80GB HBM3 there.

    Raises:
        UserError: there are none.
    """
    own = {path.stem.removeprefix("rates-"): path for path in sorted(cache_folder().glob("rates-*.json"))}
    known = {name: own.get(slug(read_rates(path).gpu), path) for name, path in built_in().items()} | own
    if gpu.lower() not in known:
        raise UserError(
            f"--gpu {gpu}: no rates of this GPU were measured here ({', '.join(known)} were); {REMEDY}."
        )
    return read_rates(known[gpu.lower()])


def rates_of_device(name: str) -> Rates | None:
    """Rates of a GPU by PyTorch's name for it, the user's own first; None where it was not measured.

    Raises:
        UserError: the user's own file is damaged.
    """
    if own_path(name).exists():
        return read_rates(own_path(name))
    return next((rates for rates in map(read_rates, built_in().values()) if rates.gpu == name), None)


def _rates(given: Any) -> Rates:
    def link(name: str) -> Link | None:
        points = given[name]
        if points is None:
            return None
        pairs = tuple((float(size), float(seconds)) for size, seconds in points)
        if len(pairs) < 2 or any(a >= b for (a, _), (b, _) in pairwise(pairs)):
            raise ValueError(f"{name} needs two or more sizes, ascending")
        if pairs[-1][1] <= pairs[-2][1]:
            raise ValueError(
                f"{name}: its longest message takes no longer than the one before, so it has no rate"
            )
        return Link(pairs)

    def pair(values: Any) -> tuple[float, float]:
        forward, backward = values
        return float(forward), float(backward)

    return Rates(
        gpu=given["gpu"],
        memory_gib=float(given["memory_gib"]),
        matmul_tflops=float(given["matmul_tflops"]),
        memory_gb_per_s=float(given["memory_gb_per_s"]),
        attention={
            int(size): AttentionRates(**{name: pair(values) for name, values in kinds.items()})
            for size, kinds in given["attention"].items()
        },
        logit_ps={name: float(value) for name, value in given["logit_ps"].items()},
        around_gb_per_s={name: float(value) for name, value in given["around_gb_per_s"].items()},
        estimate_ns=float(given["estimate_ns"]),
        host_gb_per_s=None if given["host_gb_per_s"] is None else float(given["host_gb_per_s"]),
        intra=link("intra"),
        inter=link("inter"),
        sources=dict(given["sources"]),
    )
