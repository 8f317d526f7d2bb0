"""One row of a benchmark, where it came from, and the file it goes to."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from mtraining.errors import UserError
from mtraining.kernel.measured_tiles import device_name, slug, triton_version
from mtraining.sizes import size_text

COMMIT_VARIABLE = "MTRAINING_COMMIT"


@dataclass(frozen=True)
class Row:
    """One timed phase.

    ``tflops`` counts 4 * block^2 * head_dim for each slash tile and the useful area of columns, backward 2.5 times
    that; ``dense_tflops`` counts all causal tiles the same way. ``dense_backend`` is the best dense kernel of the run
    for this shape, with ``@length`` where it was timed on a shorter sequence. ``index_mib``: the index and the
    gathered columns. ``tiles``: what `mtraining.kernel.measured_tiles.tiles_in_use` says; None for kernels of others.
    ``warm_up_s``: seconds of the same work before what was timed, and ``sm_mhz`` the clock meanwhile
    (``mtraining.bench.timing``).
    """

    date: str
    commit: str
    gpu: str
    torch: str
    triton: str
    backend: str
    pattern: str
    seq_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    blocks_per_row: float | None
    columns: int
    phase: str
    ms: float
    tflops: float | None
    dense_backend: str | None
    dense_tflops: float | None
    ratio: float | None
    index_mib: float | None
    peak_mib: float | None
    tiles: str | None
    warm_up_s: float
    sm_mhz: float | None


@dataclass(frozen=True)
class Provenance:
    """What every row of a run shares."""

    date: str
    commit: str
    gpu: str
    torch: str
    triton: str


def provenance(device: torch.device) -> Provenance:
    """Read from this machine, now.

    Raises:
        UserError: no way to tell which code this is.
    """
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    return Provenance(today, code_version(), device_name(device), torch.__version__, triton_version())


def code_version() -> str:
    """The commit: ``MTRAINING_COMMIT``, else git's (``+`` where files differ from it), else the installed version."""
    if os.environ.get(COMMIT_VARIABLE):
        return os.environ[COMMIT_VARIABLE]
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        return "v" + metadata.version("mtraining")
    except metadata.PackageNotFoundError:
        raise UserError(
            f"{COMMIT_VARIABLE}: there is no git repository here to tell the commit; set it in the environment."
        ) from None


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def appended(path: Path, header: Sequence[str]) -> Iterator[Callable[[Iterable[object]], None]]:
    """Append to a CSV file, made with its folder and ``header`` where it is new: gives what writes a row, at once.

    Raises:
        UserError: the file has other columns.
    """
    new = not path.exists()
    if not _has(path, header):
        raise UserError(
            f"{path} has other columns than are written now; name another file, or move this one away."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")

        def write(row: Iterable[object]) -> None:
            writer.writerow(row)
            file.flush()

        if new:
            write(header)
        yield write


def write_csv(rows: Sequence[Any], folder: Path, name: str) -> Path:
    """Append rows to ``folder``/name-GPU-DATE.csv, with a header where it is new; returns its path.

    Where that file has other columns, from another version of the program, a number follows the date.

    Args:
        rows: dataclasses of one kind, with ``gpu`` and ``date``.
    """
    header = [field.name for field in fields(rows[0])]
    stem = f"{name}-{slug(rows[0].gpu)}-{rows[0].date}"
    names = chain([stem], (f"{stem}-{number}" for number in count(2)))
    path = next(path for name in names if _has(path := folder / f"{name}.csv", header))
    with appended(path, header) as write:
        for row in rows:
            write(_cell(value) for value in asdict(row).values())
    return path


def _has(path: Path, header: Sequence[str]) -> bool:
    """Whether rows of these columns may be appended to a file, or to one that does not exist."""
    if not path.is_file():  # new, or a device
        return True
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), None) == list(header)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def plain_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table of text, every column flush right."""
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (heads, *cells)
    )


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of what a reader wants first."""
    heads = ["backend", "tokens", "heads", "dim", "blocks", "columns", "phase", "ms", "TFLOP/s", "best dense", "ratio",
             "index", "peak memory", "SM MHz"]  # fmt: skip
    cells = [
        [
            row.backend,
            str(row.seq_len),
            f"{row.q_heads}/{row.kv_heads}",
            str(row.head_dim),
            "all" if row.blocks_per_row is None else f"{row.blocks_per_row:.1f}",
            str(row.columns),
            row.phase,
            f"{row.ms:.3f}",
            "" if row.tflops is None else f"{row.tflops:.3g}",
            "" if row.dense_tflops is None else f"{row.dense_backend} {row.dense_tflops:.3g}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "" if row.index_mib is None else size_text(row.index_mib * 2**20),
            "" if row.peak_mib is None else size_text(row.peak_mib * 2**20),
            "" if row.sm_mhz is None else f"{row.sm_mhz:.0f}",
        ]
        for row in rows
    ]
    return heads, cells
