"""`mtraining bench attention`: estimation, forward and backward of sparse attention, beside dense kernels.

Needs torch (and Triton on a GPU) only, so ``python -m mtraining.bench.attention`` runs where the command line's
packages are missing.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from mtraining.bench.attention import gate
from mtraining.bench.attention.cases import Case, preset
from mtraining.bench.attention.competitors import COMPETITORS, Competitor, available, honours
from mtraining.bench.attention.problem import Layer, Problem, build
from mtraining.bench.options import AttentionOptions, parse
from mtraining.bench.record import Provenance, Row, plain_table, provenance, table, write_csv
from mtraining.bench.timing import Timing, measure
from mtraining.errors import UserError, first_line
from mtraining.kernel import Backend, select_backend
from mtraining.kernel.measured_tiles import tiles_in_use
from mtraining.pattern import SequenceShard, VerticalSlash

SMALL = 2048  # tokens of the whole comparison with the fp64 reference
DENSE_LONGEST = 128 * 1024  # dense rates hardly change beyond, and seconds a launch add up
Say = Callable[[str], None]


@dataclass
class BenchResult:
    """Rows that may be believed, and what was left out: ``failures`` were wrong, ``notes`` could not run."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Dense:
    """The best dense kernel for a head shape, by phase: (name, TFLOP/s)."""

    best: dict[str, tuple[str, float]]


def run_attention_bench(
    cases: Sequence[Case],
    backends: Sequence[str] = ("auto",),
    device: torch.device | str = "cuda",
    *,
    competitors: Sequence[str] = COMPETITORS,
    seconds: float = 0.5,
    warm_up: float = AttentionOptions.warm_up,
    keep: Callable[[list[Row]], object] = lambda rows: None,
    backend_of: Callable[[str, torch.device, torch.dtype, int], Backend] = select_backend,
    say: Say = print,
) -> BenchResult:
    """Gate, then time every case with every backend.

    Args:
        backends: names for ``kernel``; one that refuses a case is noted and skipped for it.
        competitors: dense kernels to time as well (once a head shape and length), where they can run.
        seconds: of repetitions a timing.
        warm_up: seconds of repetitions before them (``mtraining.bench.timing``).
        keep: given the new rows after each case, so that a run cut short loses little.
        say: told of progress, line by line.
    """
    device = torch.device(device)
    for name in competitors:
        if name not in COMPETITORS:
            raise UserError(f"dense: {name!r} is not known; choose from {', '.join(COMPETITORS)}.")
    rivals = tuple(name for name in competitors if name in available(device))
    bench = _Bench(device, rivals, seconds, warm_up, say, provenance(device), BenchResult())
    for case in cases:
        say(case.describe())
        kept = len(bench.result.rows)
        best = bench.dense(case)
        for name in backends:
            try:
                backend = backend_of(name, device, case.dtype, case.head_dim)
            except UserError as refusal:
                bench.note(f"{name}: not run on {case.describe()}: {refusal}")
                continue
            bench.sparse(case, backend, best)
        if "flex" in rivals and case.blocks_per_row is not None and not case.columns:
            bench.competitor("flex_blocks", replace(case, estimate=False), best)
        keep(bench.result.rows[kept:])
    return bench.result


@dataclass
class _Bench:
    device: torch.device
    rivals: tuple[str, ...]
    seconds: float
    warm_up: float
    say: Say
    provenance: Provenance
    result: BenchResult
    _dense: dict[Case, _Dense] = field(default_factory=dict)
    _passed: dict[tuple[str, Case], bool] = field(default_factory=dict)

    def note(self, text: str) -> None:
        self.result.notes.append(text)
        self.say("  " + text)

    def fail(self, text: str) -> None:
        self.result.failures.append(text)
        self.say("  WRONG, not timed: " + text)

    def sparse(self, case: Case, backend: Backend, dense: _Dense) -> None:
        """Gate and time one backend; a crash is a failure like a wrong result, and the run goes on."""
        try:
            self._sparse(case, backend, dense)
        except UserError as refusal:
            self.note(f"{backend.name}: not run on {case.describe()}: {refusal}")
        except Exception as crash:
            self.fail(f"{backend.name}, {case.describe()}: {type(crash).__name__}: {first_line(crash)}")
        self._free()

    def _sparse(self, case: Case, backend: Backend, dense: _Dense) -> None:
        if not self._whole_gate(case, backend):
            return
        layer = Layer(backend, build(case, self.device, seed=1))
        try:
            out, lse = layer.forward()
            gate.check_sampled(layer.p, out, lse, layer.backward(out, lse))
        except gate.GateError as wrong:
            self.fail(f"{backend.name}, {case.describe()}: {wrong}")
            return
        del out, lse
        share = 0.0
        for phase, run in layer.phases().items():
            timing = self._measure(run)
            share += timing.ms
            self._row(backend.name, layer.p, phase, timing, dense)
        if case.estimate:
            self._estimate(backend, layer.p, share, dense)

    def _whole_gate(self, case: Case, backend: Backend) -> bool:
        """Against the reference on a shortened sequence; once for all lengths that shorten to the same."""
        small = replace(case.shortened(SMALL), estimate=False)
        key = (backend.name, small)
        if key not in self._passed:
            try:
                gate.check_whole(Layer(backend, build(small, self.device, seed=2)))
                self._passed[key] = True
            except gate.GateError as wrong:
                self._passed[key] = False
                self.fail(f"{backend.name}, {small.describe()}: {wrong}")
        return self._passed[key]

    def _estimate(self, backend: Backend, p: Problem, attention_ms: float, dense: _Dense) -> None:
        pattern = VerticalSlash(block_size=p.case.block_size)
        positions = torch.arange(p.index.seq_len, device=self.device)[None]
        shard = SequenceShard(positions, backend=backend)
        timing = self._measure(lambda: pattern.estimate(p.q, p.k, shard, p.scale))
        index = pattern.estimate(p.q, p.k, shard, p.scale)
        p = replace(p, index=index)
        self._row(backend.name, p, "estimate", timing, dense, pattern=pattern.name)
        self.say(
            f"  estimation is {timing.ms / attention_ms:.1%} of forward + backward; index and gathered columns are "
            f"{(index.nbytes() + p.columns_bytes()) / p.keys_bytes():.1%} of K and V"
        )

    def dense(self, case: Case) -> _Dense:
        """The best dense kernel on this head shape, at this length or the longest that is sensible."""
        seq_len = min(case.seq_len, DENSE_LONGEST)
        key = replace(case, seq_len=seq_len, blocks_per_row=None, columns=0, estimate=False)
        if key not in self._dense:
            self._dense[key] = self._time_dense(key)
        at = "" if seq_len == case.seq_len else f"@{seq_len}"
        return _Dense({phase: (name + at, rate) for phase, (name, rate) in self._dense[key].best.items()})

    def _time_dense(self, case: Case) -> _Dense:
        best: dict[str, tuple[str, float]] = {}
        for name in self.rivals:
            if not honours(name, case):
                self.note(f"{name}: not run on {case.describe()}: it knows no such starts")
                continue
            for phase, rate in self.competitor(name, case, _Dense({})).items():
                if rate > best.get(phase, ("", 0.0))[1]:
                    best[phase] = (name, rate)
        return _Dense(best)

    def competitor(self, name: str, case: Case, dense: _Dense) -> dict[str, float]:
        """TFLOP/s by phase of another implementation; empty where it cannot run or is wrong."""
        p = build(case, self.device, seed=3)
        rates: dict[str, float] = {}
        try:
            other = Competitor(name, p)
            with torch.no_grad():
                out = other.forward().detach()
            dq, dk, dv = other.backward()
            gate.check_sampled(p, out, None, (dq, dk, dv))
            del out, dq, dk, dv
            for phase, run in (("forward", other.forward), ("backward", other.backward)):
                rates[phase] = self._row(name, p, phase, self._measure(run), dense, inner=False)
        except gate.GateError as wrong:
            self.fail(f"{name}, {case.describe()}: {wrong}")
        except Exception as error:  # another's kernel that cannot run here is no failure of ours
            self.note(f"{name}: not run on {case.describe()}: {type(error).__name__}: {first_line(error)}")
        self._free()
        return rates

    def _measure(self, run: Callable[[], object]) -> Timing:
        return measure(run, self.device, self.seconds, self.warm_up)

    def _row(
        self, backend: str, p: Problem, phase: str, timing: Timing, dense: _Dense, *, pattern: str | None = None,
        inner: bool = True,
    ) -> float:  # fmt: skip
        """Append a row; returns its TFLOP/s (0 for the estimate, whose operations are not counted)."""
        case, index = p.case, p.index
        tflops = None if phase == "estimate" else p.flops(phase) / timing.ms / 1e9
        name, rate = dense.best.get(phase, (None, None)) if tflops else (None, None)
        tiles = torch.arange(index.num_blocks, 0, -1, device=index.diagonals.device)
        blocks = float((index.diagonals * tiles).sum(-1).double().mean()) / index.num_blocks
        if index.starts is not None:
            without = replace(index, columns=index.columns[..., :0])
            blocks = float(without.computed_area().mean()) / index.num_blocks / index.block_size**2
        mib = (index.nbytes() + p.columns_bytes()) / 2**20
        row = Row(
            **asdict(self.provenance), backend=backend, pattern=pattern or case.name(), seq_len=case.seq_len,
            q_heads=case.q_heads, kv_heads=case.kv_heads, head_dim=case.head_dim, blocks_per_row=blocks,
            columns=index.columns.shape[-1], phase=phase, ms=timing.ms, tflops=tflops, dense_backend=name,
            dense_tflops=rate, ratio=tflops / rate if tflops and rate else None, index_mib=mib if inner else None,
            peak_mib=timing.peak_mib, tiles=tiles_in_use(self.device, case.dtype, case.head_dim) if inner else None,
            warm_up_s=self.warm_up, sm_mhz=timing.sm_mhz,
        )  # fmt: skip
        self.result.rows.append(row)
        beside = f", {row.ratio:.2f} of {name}" if row.ratio else ""
        self.say(
            f"  {backend} {phase}: {timing.ms:.3f} ms" + (f", {tflops:.4g} TFLOP/s{beside}" if tflops else "")
        )
        return tflops or 0.0

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def growth(rows: Sequence[Row]) -> list[str]:
    """Time a token, and cycles of the multiprocessors where their clock is known, at each length relative to the
    shortest: a line for rows alike but for their length. Where time grows and cycles do not, the clock fell."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.pattern != "dense" and row.blocks_per_row is not None and row.index_mib is not None:
            blocks = "" if row.phase == "estimate" else str(round(row.blocks_per_row))
            key = (row.backend, row.phase, row.q_heads, row.kv_heads, row.head_dim, blocks, row.columns)
            groups.setdefault(key, []).append(row)
    lines = []
    for (backend, phase, *_), group in groups.items():
        group.sort(key=lambda row: row.seq_len)
        if group[0].seq_len != group[-1].seq_len:
            counted = {"time": [row.ms for row in group]}
            if all(row.sm_mhz for row in group):
                counted["cycles"] = [row.ms * (row.sm_mhz or 0) for row in group]
            for what, amounts in counted.items():
                a_token = [amount / row.seq_len for row, amount in zip(group, amounts, strict=True)]
                parts = ", ".join(
                    f"{row.seq_len}: {each / a_token[0]:.2f}"
                    for row, each in zip(group, a_token, strict=True)
                )
                lines.append(
                    f"{backend} {phase}, {what} a token relative to {group[0].seq_len} tokens: {parts}"
                )
    return lines


def default_backends(device: torch.device) -> tuple[str, ...]:
    return ("triton", "flash4") if device.type == "cuda" else ("reference",)


def bench(options: AttentionOptions, say: Say = print) -> tuple[BenchResult, Path | None]:
    """Run a preset, adding to its CSV case by case; the path is None where there is no row to write."""
    if options.warm_up < 0:
        raise UserError(f"warm-up: {options.warm_up} seconds cannot be; use 0 or more.")
    where = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cases = preset(
        options.preset or ("targets" if where.type == "cuda" else "tiny"),
        options.max_seq_len,
        options.documents,
        options.window,
    )
    paths: list[Path] = []
    result = run_attention_bench(
        cases,
        options.backend or default_backends(where),
        where,
        competitors=() if options.dense == ("none",) else options.dense or COMPETITORS,
        warm_up=options.warm_up,
        keep=lambda rows: paths.append(write_csv(rows, options.out, "attention")) if rows else None,
        say=say,
    )
    for line in growth(result.rows):
        say(line)
    return result, paths[-1] if paths else None


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the command line's packages: a plain table; 1 where a kernel was wrong, 2 for bad input."""
    try:
        options, _ = parse(AttentionOptions, "python -m mtraining.bench.attention", __doc__, argv)
        result, path = bench(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(plain_table(*table(result.rows)))
    print(f"wrote {path}" if path else "no number to write")
    return 1 if result.failures else 0
