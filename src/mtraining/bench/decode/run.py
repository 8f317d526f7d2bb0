"""How near decode attention comes to the speed of memory.

One new token a row must read every key and value of the cache once, and computes little with them. So the time to beat
is that of reading so many bytes, and what memory gives is measured here by a copy of one tensor to another. A copy both
reads and writes: a kernel that only reads may come out a little above 100 %. Nothing wrong is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mtraining.bench.attention.gate import poisoned_memory
from mtraining.bench.record import provenance, write_csv
from mtraining.bench.timing import measure
from mtraining.errors import UserError
from mtraining.kernel import select_decode
from mtraining.kernel.reference.decode import decode_attention as reference

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_GATED = 16384  # tokens of the longest cache that is compared with the reference, besides its tail
_COPY = 1 << 30  # bytes


@dataclass(frozen=True)
class Case:
    """A cache on one rank: rows, heads and tokens of each row."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    tokens: int


PRESETS: dict[str, tuple[Case, ...]] = {
    "targets": tuple(
        Case(batch, *heads, tokens)
        for heads in ((16, 2, 128), (32, 8, 128), (9, 3, 64))  # Qwen2.5-3B, Llama-3-8B, SmolLM2-135M
        for batch, tokens in ((1, 8192), (1, 65536), (1, 262144), (8, 32768))
    ),
    "tiny": (Case(2, 4, 2, 64, 256), Case(1, 3, 3, 96, 100)),
}


@dataclass(frozen=True)
class Row:
    """One case's time. ``gb_s``: keys and values read a second; ``share``: of what a copy moves, ``copy_gb_s``."""

    date: str
    commit: str
    gpu: str
    torch: str
    triton: str
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    dtype: str
    ms: float
    gb_s: float
    copy_gb_s: float
    share: float
    sm_mhz: float | None


def bench(
    name: str,
    dtype: str,
    device: str,
    out: Path,
    cases: Sequence[Case] | None = None,
    seconds: float = 0.5,
    say: Callable[[str], object] = print,
) -> tuple[list[Row], Path | None, list[str]]:
    """Time a preset; rows, the CSV they went to (None without any), and what was wrong.

    Raises:
        UserError: a preset or dtype that is not known.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = name or ("targets" if where.type == "cuda" else "tiny")
    for option, value, known in (("--preset", name, PRESETS), ("--dtype", dtype, DTYPES)):
        if value not in known:
            raise UserError(f"{option} {value} is not known; choose one of {', '.join(known)}.")
    kind, about, rows, wrong = DTYPES[dtype], provenance(where), [], []
    copy = copy_speed(where, seconds)
    say(f"a copy moves {copy:.0f} GB/s")
    for case in PRESETS[name] if cases is None else cases:
        fault = check(case, kind, where)
        if fault is not None:
            wrong.append(f"{case}: {fault}")
            continue
        q, k, v = tensors(case, kind, where)
        lengths = torch.full((case.batch,), case.tokens, dtype=torch.int32, device=where)
        decode, scale = select_decode("auto", where, kind), case.head_dim**-0.5
        timing = measure(lambda: decode(q, k, v, lengths, case.tokens, scale), where, seconds)  # noqa: B023
        speed = (k.nbytes + v.nbytes) / timing.ms / 1e6
        rows.append(
            Row(
                **vars(about), **vars(case), dtype=dtype, ms=timing.ms, gb_s=speed, copy_gb_s=copy,
                share=speed / copy, sm_mhz=timing.sm_mhz,
            )
        )  # fmt: skip
        say(f"{case}: {timing.ms:.4f} ms, {speed:.0f} GB/s, {speed / copy:.0%} of a copy")
    return rows, write_csv(rows, out, "decode") if rows else None, wrong


def tensors(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A query, and keys and values laid out as generation's cache keeps them."""
    made = torch.Generator(device).manual_seed(0)

    def cache() -> Tensor:
        shape = case.batch, case.kv_heads, case.tokens, case.head_dim
        return torch.randn(shape, generator=made, device=device, dtype=dtype).transpose(1, 2)

    q = torch.randn(case.batch, case.q_heads, case.head_dim, generator=made, device=device, dtype=dtype)
    return q, cache(), cache()


def check(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with the kernel at this shape, rows cut to different lengths; None where nothing is."""
    tokens = min(case.tokens, _GATED)
    q, k, v = tensors(Case(case.batch, case.q_heads, case.kv_heads, case.head_dim, tokens), dtype, device)
    cut = [max(1, tokens - 77 * row) for row in range(case.batch)]
    lengths = torch.tensor(cut, dtype=torch.int32, device=device)
    for row, length in enumerate(cut):
        k[row, length:], v[row, length:] = torch.nan, torch.nan
    scale = case.head_dim**-0.5
    with poisoned_memory():
        out, lse = select_decode("auto", device, dtype)(q, k, v, lengths, tokens, scale)
    want, want_lse = reference(q.double(), k.double(), v.double(), lengths, tokens, scale)
    error = float((out.double() - want).norm() / want.norm())
    lse_error = float((lse.double() - want_lse).abs().max())
    if not error <= TOLERANCE[dtype]:
        return f"relative error {error:.1e}, at most {TOLERANCE[dtype]:.0e} is allowed"
    return None if lse_error <= 1e-3 else f"error of lse {lse_error:.1e}, at most 1e-03 is allowed"


def copy_speed(device: torch.device, seconds: float) -> float:
    """Bytes read and written by a copy, in GB/s."""
    size = _COPY if device.type == "cuda" else _COPY // 64
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size / measure(lambda: target.copy_(source), device, seconds).ms / 1e6


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of what a reader wants first."""
    heads = ["rows", "heads", "dim", "tokens", "dtype", "ms", "GB/s", "share of a copy", "SM MHz"]
    cells = [
        [
            str(row.batch), f"{row.q_heads}/{row.kv_heads}", str(row.head_dim), str(row.tokens), row.dtype,
            f"{row.ms:.4f}", f"{row.gb_s:.0f}", f"{row.share:.0%}",
            "" if row.sm_mhz is None else f"{row.sm_mhz:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    return heads, cells
