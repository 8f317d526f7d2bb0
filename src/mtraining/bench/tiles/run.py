"""`mtraining bench tiles`: which tiles are fastest for the portable Triton kernels on this GPU, kept in a file.

Runs read that file from then on (``mtraining.kernel.measured_tiles``); nothing is searched while training. Needs
torch and Triton only, so ``python -m mtraining.bench.tiles`` runs where the command line's packages are missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

from mtraining.bench.attention import gate
from mtraining.bench.attention.cases import Case
from mtraining.bench.attention.problem import Layer, Problem, build
from mtraining.bench.options import TilesOptions, parse
from mtraining.bench.record import plain_table, provenance
from mtraining.bench.tiles.candidates import candidates
from mtraining.bench.timing import measure
from mtraining.errors import UserError
from mtraining.inputs.text import replace_text
from mtraining.kernel import select_backend
from mtraining.kernel.measured_tiles import (
    DTYPES,
    TILED_KERNELS,
    KernelCase,
    TileSizes,
    entry_case,
    measured_tiles,
    read_tiles,
    tiles_path,
)
from mtraining.kernel.triton.backend import TritonBackend
from mtraining.kernel.triton.lists import lists_both_ways
from mtraining.kernel.triton.tile_sizes import check_block_size, forced_tiles, interpreted

MARGIN = 0.02  # what a candidate must gain on the tables' entry; less is noise
GATE_TOKENS = 1024
# What every kernel but the one on trial takes: it fits any GPU, so a failure is the candidate's.
_SAFE = dict.fromkeys(TILED_KERNELS, TileSizes(32, 32, 4, 1))
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """What the search for one call came to: ms by tiles, and why other candidates have none."""

    chosen: TileSizes
    table: TileSizes
    ms: dict[TileSizes, float]
    left_out: dict[TileSizes, str]


@dataclass
class TilesResult:
    """Choices by call; ``failures`` were wrong or crashed, ``notes`` say what was not searched."""

    choices: dict[KernelCase, Choice] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def choose(
    name: str,
    tried: Sequence[TileSizes],
    passes: Callable[[TileSizes], None],
    time: Callable[[TileSizes], float],
    result: TilesResult,
    say: Say,
) -> Choice | None:
    """The fastest of the candidates that pass; the first, the tables', unless another is faster by ``MARGIN``, twice.

    Args:
        name: of the call, for what is told.
        passes: raises ``GateError`` where a candidate is wrong, ``TritonError`` where it does not fit.
        time: milliseconds.
        result: wrong candidates are added to its failures.

    Returns:
        None where no candidate is left.
    """
    ms: dict[TileSizes, float] = {}
    left_out: dict[TileSizes, str] = {}
    for tiles in tried:
        try:
            passes(tiles)
            ms[tiles] = time(tiles)
        except Exception as error:
            if _does_not_fit(error):
                left_out[tiles] = f"does not fit: {_last_line(error)}"
            else:  # a crash is a failure like a wrong result, and the search goes on
                kind = "" if isinstance(error, gate.GateError) else f"{type(error).__name__}: "
                left_out[tiles] = f"WRONG: {kind}{_last_line(error)}"
                result.failures.append(f"{name}, {shown(tiles)}: {kind}{_last_line(error)}")
        say(f"  {name} {shown(tiles)}: {left_out.get(tiles) or f'{ms[tiles]:.3f} ms'}")
    if not ms:
        result.failures.append(f"{name}: no candidate is left, so the tables' entry stays")
        return None
    table, best = tried[0], min(ms, key=lambda tiles: ms[tiles])
    if table in ms and best != table:
        if _gains(ms[best], ms[table]):  # the least of several noisy readings flatters: read the two again
            try:
                ms |= {tiles: time(tiles) for tiles in (table, best)}
            except Exception as error:  # a later candidate may have left the GPU in an error state
                result.failures.append(f"{name}: the tables' entry stays: {_last_line(error)}")
                best = table
        if not _gains(ms[best], ms[table]):
            best = table
    return Choice(best, table, ms, left_out)


def _gains(ms: float, beside: float) -> bool:
    return ms <= (1 - MARGIN) * beside


def _does_not_fit(error: BaseException) -> bool:
    """Too much shared memory, or nothing that Triton or the assembler can make of it."""
    if isinstance(error, InterpreterError):
        return False
    return isinstance(error, TritonError) or "PassManager::run failed" in str(error)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[-1][:200]


def shown(tiles: TileSizes) -> str:
    """Tile sizes in a few words."""
    copied = ", TMA" if tiles.tma else ""
    return f"{tiles.block_m}x{tiles.block_n}, {tiles.warps} warps, {tiles.stages} stages{copied}"


def kernel_runs(backend: TritonBackend, p: Problem) -> dict[str, Callable[[], object]]:
    """Each kernel of a layer by itself, ready to be repeated, as the layer launches it."""
    layer = Layer(backend, p)
    columns = layer.columns()
    assert columns is not None
    ck, cv = columns
    out, lse = layer.forward()
    delta = backend.row_delta(out, p.dout)
    part, part_lse, dq = out.float(), lse.clone(), torch.zeros_like(out, dtype=torch.float32)
    size, blocks = p.index.block_size, p.place.q_blocks
    lists, by_key = lists_both_ways(p.index, p.place)
    given = (p.dout, p.q, p.k, p.v, lse, delta)

    # A new view of ck each time: the backward kernels of one pass share tables by it, and here each makes its own.
    return {
        "tiles_forward": lambda: backend.tiles_forward(
            p.q, p.k, p.v, p.index, p.place, p.scale, part, part_lse
        ),
        "tiles_dq": lambda: backend.tiles_dq(*given, lists, size, p.scale, None),
        "tiles_dkdv": lambda: backend.tiles_dkdv(*given, by_key, p.place, size, p.scale),
        "columns_forward": lambda: backend.columns_forward(p.q, ck, cv, p.index, blocks, p.scale, None, None),
        "columns_dq": lambda: backend.columns_dq(
            p.dout, p.q, ck[:], cv, lse, delta, p.index, blocks, p.scale, dq
        ),
        "columns_dkdv": lambda: backend.columns_backward(
            p.dout, p.q, ck[:], cv, lse, delta, p.index, blocks, p.scale
        ),
    }


def search(case: Case, device: torch.device, seconds: float, result: TilesResult, say: Say) -> None:
    """Gate and time the candidates of every kernel on a case, adding to ``result``."""
    backend = TritonBackend()
    size = case.block_size
    short = build(case.shortened(max(4, GATE_TOKENS // size) * size), device, seed=2)
    if not all(short.areas):
        raise UserError(
            f"seq-len: {case.seq_len} leaves the gate no tiles or no columns to see; use more tokens."
        )
    with forced_tiles(_SAFE):
        runs = kernel_runs(backend, build(case, device, seed=1))
    for kernel in TILED_KERNELS:

        def passes(tiles: TileSizes, kernel: str = kernel) -> None:
            with forced_tiles({**_SAFE, kernel: tiles}):
                gate.check_whole(Layer(backend, short))

        def time(tiles: TileSizes, kernel: str = kernel) -> float:
            with forced_tiles({kernel: tiles}):
                return measure(runs[kernel], device, seconds).ms

        call = KernelCase(kernel, case.dtype, case.head_dim, size)
        tried = candidates(kernel, device, case.dtype, case.head_dim, size)
        choice = choose(f"{kernel}, head_dim {case.head_dim}", tried, passes, time, result, say)
        if choice is not None:
            result.choices[call] = choice


def served_elsewhere(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Whether kernels whose tiles are part of their design serve such calls here.

    Raises:
        UserError: no Triton kernel can.
    """
    if type(select_backend("triton", device, dtype, head_dim)) is TritonBackend:
        return False
    from mtraining.kernel.hopper.backend import BLOCK

    return block_size == BLOCK


def save(choices: dict[KernelCase, Choice], device: torch.device, say: Say) -> Path:
    """Write choices to the file of this GPU, beside those that it has for other calls; returns its path."""
    path, origin = tiles_path(device), provenance(device)
    try:
        document = read_tiles(path)
    except UserError as damaged:
        say(f"begun anew: {damaged}")
        document = None
    if document is None or (document["gpu"], document["triton"]) != (origin.gpu, origin.triton):
        capability = list(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
        document = {"gpu": origin.gpu, "capability": capability, "triton": origin.triton, "entries": []}
    kept = [entry for entry in document["entries"] if entry_case(entry) not in choices]
    made = {"date": origin.date, "commit": origin.commit, "torch": origin.torch}
    document["entries"] = kept + [_entry(*item) | made for item in choices.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; set MTRAINING_CACHE to another folder."
        ) from None
    measured_tiles.cache_clear()
    return path


def _entry(call: KernelCase, choice: Choice) -> dict[str, Any]:
    readings = [{"tiles": tiles._asdict(), "ms": ms} for tiles, ms in choice.ms.items()]
    left_out = [{"tiles": tiles._asdict(), "left_out": why} for tiles, why in choice.left_out.items()]
    return call._asdict() | {
        "dtype": _DTYPE_NAMES[call.dtype],
        "tiles": choice.chosen._asdict(),
        "ms": choice.ms[choice.chosen],
        "table": choice.table._asdict(),
        "table_ms": choice.ms.get(choice.table),
        "candidates": readings + left_out,
    }


def bench(
    head_dims: Sequence[int] = (), dtypes: Sequence[str] = (), block_size: int | None = None,
    seq_len: int | None = None, seconds: float = 0.3, say: Say = print,
) -> tuple[TilesResult, Path | None]:  # fmt: skip
    """Search for each head_dim and dtype, saving after each; the path is None where nothing was chosen.

    What is not given is what suits the machine: a GPU, or with TRITON_INTERPRET=1 a tiny case on the CPU.

    Raises:
        UserError: no device for it, or options that no kernel serves.
    """
    if interpreted():
        device, case = torch.device("cpu"), Case(96, 1, 1, 16, 1.5, 20, block_size=32, dtype=torch.float32)
        head_dims, dtypes = head_dims or (case.head_dim,), dtypes or ("fp32",)
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        case = Case(32 * 1024, 16, 4, 128, 27, 2048)
        head_dims, dtypes = head_dims or (64, 96, 128, 256), dtypes or ("bf16",)
    else:
        raise UserError(
            "bench tiles times kernels for NVIDIA GPUs, and PyTorch finds none here; run it on the GPU that will "
            "train, or set TRITON_INTERPRET=1 to try the command on the CPU, where times mean nothing."
        )
    case = _resized(case, block_size or case.block_size, seq_len or case.seq_len)
    result, path = TilesResult(), None
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UserError(f"dtype: {dtype!r} is not known; choose from {', '.join(DTYPES)}.")
        for head_dim in head_dims:
            this = Case(**{**vars(case), "head_dim": head_dim, "dtype": DTYPES[dtype]})
            if served_elsewhere(device, this.dtype, head_dim, this.block_size):
                result.notes.append(
                    f"head_dim {head_dim}, {dtype}: blocks of {this.block_size} run kernels written for this GPU, "
                    "whose tiles are part of their design; not searched"
                )
                say(result.notes[-1])
                continue
            say(f"{dtype}, {this.describe()}, blocks of {this.block_size}")
            found = TilesResult(failures=result.failures)
            search(this, device, seconds, found, say)
            result.choices |= found.choices
            if found.choices:
                path = save(found.choices, device, say)
    return result, path


def _resized(case: Case, block_size: int, seq_len: int) -> Case:
    check_block_size(block_size)
    blocks = max(2, round(seq_len / block_size))
    if seq_len != blocks * block_size:
        raise UserError(
            f"seq-len: {seq_len} is not two or more blocks of {block_size}; use {blocks * block_size}."
        )
    return Case(**{**vars(case), "block_size": block_size}).shortened(seq_len)


def table(result: TilesResult) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the choices."""
    heads = ["kernel", "head_dim", "dtype", "block", "chosen", "ms", "table", "ms"]
    cells = []
    for call, choice in result.choices.items():
        beside = choice.ms.get(choice.table)
        same = choice.chosen == choice.table
        cells.append(
            [call.kernel, str(call.head_dim), _DTYPE_NAMES[call.dtype], str(call.block_size), shown(choice.chosen),
             f"{choice.ms[choice.chosen]:.3f}", "the same" if same else shown(choice.table),
             "does not run" if beside is None else f"{beside:.3f}"]
        )  # fmt: skip
    return heads, cells


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the command line's packages: a plain table; 1 where a candidate failed, 2 for bad input."""
    try:
        options, _ = parse(TilesOptions, "python -m mtraining.bench.tiles", __doc__, argv)
        result, path = bench(options.head_dim, options.dtype, options.block_size, options.seq_len)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(plain_table(*table(result)))
    print(*result.failures, f"wrote {path}" if path else "nothing to write", sep="\n")
    return 1 if result.failures else 0
