"""The heaviest entries of each row without sorting: a radix search for the weight at which the budget runs out.

Masses are non-negative, so their fp32 bit patterns order like their values. Three passes over 11 + 10 + 10 bits count
the entries of each bucket and sum their mass. After each pass, the bucket in which count or mass reaches the budget is
the one to look into. What remains is a threshold, and how many of the entries equal to it are kept.

Count and mass of a bucket share one int64: the count in the low bits, the mass as a fixed-point number above it. Their
sums are exact, so they do not depend on the order in which atomic additions arrive, and a top_p of 1 keeps exactly the
entries with mass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtraining.kernel.triton.launch import launch

_CHUNK = 4096
_LEVELS = ((20, 2048), (10, 1024), (0, 1024))  # (bits below the digit, buckets)
# Columns of the per-row state, int64.
_PREFIX, _ABOVE, _TARGET, _TIES = (tl.constexpr(i) for i in range(4))
_STATE = tl.constexpr(4)


@triton.jit
def _load_bits(mass_ptr, forced_ptr, row, chunk, n, CHUNK: tl.constexpr):
    """Places, bit patterns (0 where there is no entry, or no mass) and the forced flag of one chunk of a row."""
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    there = place < n
    bits = tl.load(mass_ptr + row * n + place, mask=there, other=0.0).to(tl.int32, bitcast=True)
    forced = tl.load(forced_ptr + place, mask=there, other=0) != 0
    return place, tl.maximum(bits, 0), forced & there


@triton.jit
def _fixed_point(bits, total, MASS_BITS: tl.constexpr):
    """Mass in units of about total / 2^(MASS_BITS - 2), so that a row's sum stays below 2^MASS_BITS."""
    exponent = (total.to(tl.int32, bitcast=True) >> 23) - 127  # total < 2^(exponent + 1)
    exponent = tl.maximum(exponent, MASS_BITS - 128)  # the unit must itself be a finite fp32
    unit = ((MASS_BITS - 2 - exponent + 127) << 23).to(tl.float32, bitcast=True)
    return (bits.to(tl.float32, bitcast=True) * unit + 0.5).to(tl.int64)


@triton.jit
def histogram_kernel(
    mass_ptr, forced_ptr, total_ptr, state_ptr, hist_ptr, n, LEVEL: tl.constexpr, SHIFT: tl.constexpr,
    BUCKETS: tl.constexpr, COUNT_BITS: tl.constexpr, MASS_BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count and mass of each bucket of this level's digit, over entries that share the digits found so far.

    hist is int64 (rows, BUCKETS + 1); its last place, at the first level, takes the forced entries.
    """
    row = tl.program_id(1).to(tl.int64)
    _, bits, forced = _load_bits(mass_ptr, forced_ptr, row, tl.program_id(0), n, CHUNK)
    weight = 1 + (_fixed_point(bits, tl.load(total_ptr + row), MASS_BITS) << COUNT_BITS)
    digit = (bits >> SHIFT) & (BUCKETS - 1)
    joins = (bits > 0) & (forced == 0)  # entries without mass need no bucket: they are what is left
    if LEVEL == 0:
        bucket = tl.where(forced, BUCKETS, digit)
        joins = joins | forced
    else:
        bucket = digit
        joins = joins & (
            (bits >> SHIFT) // BUCKETS == tl.load(state_ptr + row * _STATE + _PREFIX).to(tl.int32)
        )
    tl.atomic_add(hist_ptr + row * (BUCKETS + 1) + bucket, weight, mask=joins, sem="relaxed")


# How many are kept may change from step to step (`pattern.anneal.widen`): it is not compiled in.
@triton.jit(do_not_specialize=["keep"])
def narrow_kernel(
    state_ptr, hist_ptr, top_p, keep, LEVEL: tl.constexpr, LAST: tl.constexpr, BUCKETS: tl.constexpr,
    COUNT_BITS: tl.constexpr, HAS_TOP_P: tl.constexpr,
):  # fmt: skip
    """Find the bucket, from the heaviest down, in which the budget runs out; at the last level, the ties to keep."""
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * _STATE
    rank = tl.arange(0, BUCKETS)  # 0 is the heaviest bucket
    held = tl.load(hist_ptr + row * (BUCKETS + 1) + (BUCKETS - 1) - rank)
    low: tl.constexpr = (1 << COUNT_BITS) - 1
    if LEVEL == 0:
        above = tl.load(hist_ptr + row * (BUCKETS + 1) + BUCKETS)  # the forced ones come first
        total = (tl.sum(held, 0) + above) >> COUNT_BITS
        target = tl.ceil(total.to(tl.float64) * top_p).to(tl.int64)
        prefix = tl.full([], 0, tl.int64)
        tl.store(state + _TARGET, target)
    else:
        above = tl.load(state + _ABOVE)
        target = tl.load(state + _TARGET)
        prefix = tl.load(state + _PREFIX)
    upto = above + tl.cumsum(held, 0)
    full = (upto & low) >= keep
    if HAS_TOP_P:
        full = full | ((upto >> COUNT_BITS) >= target)
    # Where the budget covers every entry with mass, the lightest bucket; its last entries have no mass at all.
    cut = tl.min(tl.where(full, rank, BUCKETS - 1), 0)
    inside = tl.sum(tl.where(rank == cut, held, 0), 0)
    above = above + tl.sum(tl.where(rank < cut, held, 0), 0)
    prefix = prefix * BUCKETS + (BUCKETS - 1) - cut
    tl.store(state + _PREFIX, prefix)
    tl.store(state + _ABOVE, above)
    if LAST:
        ties = tl.maximum(keep - (above & low), 0)
        if HAS_TOP_P:
            # Tie j is wanted while the mass before it, above + j * each, is short of the target. Where ties have no
            # mass but fall short nevertheless, the count alone decides.
            each = (inside >> COUNT_BITS) // tl.maximum(inside & low, 1)
            missing = tl.maximum(target - (above >> COUNT_BITS), 0)
            by_mass = tl.where(each > 0, tl.cdiv(missing, tl.maximum(each, 1)), ties)
            ties = tl.minimum(ties, by_mass)
        tl.store(state + _TIES, ties)


@triton.jit
def _classify(mass_ptr, forced_ptr, state_ptr, row, chunk, n, CHUNK: tl.constexpr):
    """Entries of a chunk that are kept for certain, and those equal to the threshold."""
    place, bits, forced = _load_bits(mass_ptr, forced_ptr, row, chunk, n, CHUNK)
    threshold = tl.load(state_ptr + row * _STATE + _PREFIX)
    above = forced | (bits > threshold)
    equal = (bits == threshold) & (forced == 0) & (place < n)
    return place, above, equal


@triton.jit
def count_kernel(mass_ptr, forced_ptr, state_ptr, count_ptr, n, chunks, CHUNK: tl.constexpr):
    """How many entries of each chunk stand above the threshold, and how many equal it: int32 (rows, 2, chunks)."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _, above, equal = _classify(mass_ptr, forced_ptr, state_ptr, row, chunk, n, CHUNK)
    tl.store(count_ptr + (row * 2) * chunks + chunk, tl.sum(above.to(tl.int32), 0))
    tl.store(count_ptr + (row * 2 + 1) * chunks + chunk, tl.sum(equal.to(tl.int32), 0))


@triton.jit(do_not_specialize=["width"])
def select_kernel(
    mass_ptr, forced_ptr, state_ptr, count_ptr, out_ptr, n, chunks, width, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """Write the kept places in ascending order, then n: int64 (rows, width)."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place, above, equal = _classify(mass_ptr, forced_ptr, state_ptr, row, chunk, n, CHUNK)
    ties = tl.load(state_ptr + row * _STATE + _TIES).to(tl.int32)
    other = tl.arange(0, CHUNKS)
    aboves = tl.load(count_ptr + (row * 2) * chunks + other, mask=other < chunks, other=0)
    equals = tl.load(count_ptr + (row * 2 + 1) * chunks + other, mask=other < chunks, other=0)
    equals_before = tl.sum(tl.where(other < chunk, equals, 0), 0)
    before = tl.sum(tl.where(other < chunk, aboves, 0), 0) + tl.minimum(equals_before, ties)
    nth_tie = equals_before + tl.cumsum(equal.to(tl.int32), 0)
    kept = above | (equal & (nth_tie <= ties))
    slot = before + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(out_ptr + row * width + slot, place.to(tl.int64), mask=kept & (slot < width))
    # The padding: this chunk's share of the places after the last kept one.
    used = tl.sum(aboves, 0) + tl.minimum(tl.sum(equals, 0), ties)
    for first in range(chunk * CHUNK, width, chunks * CHUNK):
        pad = first + tl.arange(0, CHUNK)
        tl.store(
            out_ptr + row * width + pad, tl.full([CHUNK], 0, tl.int64) + n, mask=(pad >= used) & (pad < width)
        )


def heaviest(mass: Tensor, forced: Tensor, top_p: float | None, keep: int) -> Tensor:
    """See :meth:`mtraining.kernel.backend.EstimationKernels.heaviest`.

    Args:
        mass: fp32 (rows, n), contiguous.
        forced: bool (n,), contiguous.
    """
    rows, n = mass.shape
    width = min(keep, n)
    out = torch.empty(rows, width, dtype=torch.int64, device=mass.device)
    if out.numel() == 0:
        return out
    chunks, count_bits = triton.cdiv(n, _CHUNK), n.bit_length()
    mass_bits = min(62 - count_bits, 52)  # below 53, so that fp64 holds a row's sum exactly
    grid = (chunks, rows)
    total, flags = mass.sum(1), forced.view(torch.uint8)
    state = torch.empty(rows, _STATE.value, dtype=torch.int64, device=mass.device)
    spans = [rows * (buckets + 1) for _, buckets in _LEVELS]
    for level, (hist, (shift, buckets)) in enumerate(
        zip(torch.zeros(sum(spans), dtype=torch.int64, device=mass.device).split(spans), _LEVELS, strict=True)
    ):
        shared = {"LEVEL": level, "BUCKETS": buckets, "COUNT_BITS": count_bits}
        launch(histogram_kernel, grid)(
            mass, flags, total, state, hist, n, SHIFT=shift, MASS_BITS=mass_bits, CHUNK=_CHUNK, num_warps=8, **shared
        )  # fmt: skip
        launch(narrow_kernel, (rows,))(
            state, hist, 1.0 if top_p is None else float(top_p), width, LAST=level == len(_LEVELS) - 1,
            HAS_TOP_P=top_p is not None, num_warps=8, **shared,
        )  # fmt: skip
    counts = torch.empty(rows, 2, chunks, dtype=torch.int32, device=mass.device)
    launch(count_kernel, grid)(mass, flags, state, counts, n, chunks, CHUNK=_CHUNK, num_warps=8)
    launch(select_kernel, grid)(
        mass, flags, state, counts, out, n, chunks, width,
        CHUNK=_CHUNK, CHUNKS=triton.next_power_of_2(chunks), num_warps=8,
    )  # fmt: skip
    return out
