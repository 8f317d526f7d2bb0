"""`mtraining bench train`: whole training steps, sparse beside dense, on the GPUs there are.

The timed step is the trainer's own (model, ring, FSDP2, optimizer), under random weights and a prescribed index. The
index estimate of a real run is made too, and dropped. Nothing is timed before its loss and gradients have been found
right.

``python -m mtraining.bench.train`` needs torch and transformers only, where the command line's packages are missing.
Both start a process for each GPU, or are one of the processes that torchrun started.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from mtraining.bench.options import TrainOptions, arguments, parse
from mtraining.bench.processes import on_gpu, process_count, start, take_device, under_torchrun
from mtraining.bench.record import plain_table, provenance, write_csv
from mtraining.bench.train.cases import PRESETS, SHAPES, Group, TrainCase, parse_tokens
from mtraining.bench.train.progress import Effort, Progress
from mtraining.bench.train.record import TrainRow, draw, table
from mtraining.errors import UserError
from mtraining.model.float8_checks import check_float8, require_torchao
from mtraining.predict.moments import EIGHT_BITS
from mtraining.train.mesh import backend_for

# A rank whose peer is gone gives up after this, and the launcher starts all again.
_STUCK = timedelta(minutes=10)
Say = Callable[[str], None]


def cases_of(options: TrainOptions) -> list[TrainCase]:
    """The preset's cases with the given options in place of its own, each case once.

    Raises:
        UserError: a value that is not known.
    """
    name = options.preset or ("table" if on_gpu(options.device) else "tiny")
    if name not in PRESETS:
        raise UserError(f"preset: {name!r} is not known; choose one of {', '.join(PRESETS)}.")
    model, groups = PRESETS[name]
    model = options.model or model
    if model not in SHAPES:
        raise UserError(f"model: {model!r} is not known; choose one of {', '.join(SHAPES)}.")
    given = {field.name: getattr(options, field.name) for field in fields(Group)}
    given["seq_len"] = tuple(parse_tokens(text) for text in options.seq_len)
    given = {key: value for key, value in given.items() if value not in (None, "", ())}
    # Lengths of the user's own make one group, not one for each of the preset's.
    if options.seq_len:
        groups = groups[:1]
    cases = (case for group in groups for case in replace(group, **given).cases(SHAPES[model]))
    return list(dict.fromkeys(cases))


def check(options: TrainOptions) -> None:
    """What can be refused before any process starts.

    Raises:
        UserError: naming the option.
    """
    gpu = on_gpu(options.device)
    process_count(options.nproc, gpu)
    if options.steps < 1 or options.warmup < 1:
        raise UserError(f"steps={options.steps}, warmup={options.warmup}: both must be at least 1.")
    if options.fused == "liger" and not gpu:
        raise UserError("fused: liger needs an NVIDIA GPU; use none or compile.")
    if options.float8 or options.optimizer_state:
        device = "cuda" if gpu else "cpu"
        check_float8(options.float8 or "off", device, torch.bfloat16 if gpu else torch.float32, adapter=False)
        if options.optimizer_state == EIGHT_BITS:
            require_torchao("optimizer_state: 8bit", "offload")
    cases_of(options)


@dataclass(frozen=True)
class Outcome:
    """Rows that may be believed, what was wrong, what could not run, and the file of the rows (None without any)."""

    rows: list[TrainRow]
    failures: list[str]
    notes: list[str]
    path: Path | None


def bench(options: TrainOptions, say: Say = print) -> Outcome | None:
    """Measure, adding to the CSV case by case. Under torchrun this is one of its processes, and only the first of them
    gets the outcome; otherwise processes are started here.

    Raises:
        UserError: bad options.
    """
    check(options)
    # torchrun's agent, the parent of this process, outlives the processes that it starts again.
    if under_torchrun():
        path = Path(tempfile.gettempdir()) / f"mtraining-bench-train-{os.getppid()}.jsonl"
        return _outcome(options, path) if work(options, path, say) == 0 else None
    with tempfile.TemporaryDirectory(prefix="mtraining-bench-") as folder:
        path = Path(folder) / "progress.jsonl"
        _start(options, path)
        return _outcome(options, path)


def _start(options: TrainOptions, path: Path) -> None:
    """Start the processes: when one leaves in the middle of a case all are started again, and go on after it."""
    gpu = on_gpu(options.device)
    processes = process_count(options.nproc, gpu)
    words = [*arguments(options), f"--progress={path}"]
    failed = start("mtraining.bench.train", words, processes, gpu, restarts=len(cases_of(options)))
    if failed and not path.exists():
        raise UserError(f"nproc: {processes} processes could not be started; what they said is above.")


def _outcome(options: TrainOptions, path: Path) -> Outcome:
    found = Progress(path)
    missing = len(cases_of(options)) - len(found.ended)
    notes = found.notes + [f"{missing} cases were not reached"] * bool(missing)
    if options.chart and found.rows:
        draw(found.rows, options.chart)
    return Outcome(found.rows, found.failures, notes, found.path_of_rows)


def work(options: TrainOptions, path: Path, say: Say = print) -> int:
    """One process's part; returns its rank. Collective over the processes that torchrun started."""
    # The worker loads transformers, which the launching process can do without.
    from mtraining.bench.train.worker import run_cases
    from mtraining.model import use_expandable_segments

    with_gpu = on_gpu(options.device)
    allocator = use_expandable_segments() if with_gpu else ""
    rank, device = int(os.environ["RANK"]), take_device(with_gpu)
    dist.init_process_group(backend_for(device), timeout=_STUCK)
    if rank == 0 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        path.unlink(missing_ok=True)  # another run's, where torchrun's agent had the same number
        if allocator:
            say(allocator)
    box = [Progress(path)]
    dist.broadcast_object_list(box)
    # The first rank's: what it goes on to write is no news, and other nodes have no such file.
    progress = box[0]

    def keep(row: TrainRow) -> None:
        progress.tell(path=str(write_csv([row], options.out, "train")))

    effort = Effort(options.warmup, options.steps, options.seconds)
    try:
        run_cases(cases_of(options), effort, device, provenance(device), progress, keep, say)
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # The others may wait inside a collective, and an orderly end would wait for them.
        os._exit(1)
    dist.destroy_process_group()
    return rank


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the command line's packages: a plain table; 1 where a step was wrong, 2 for bad input."""
    try:
        options, told = parse(TrainOptions, "python -m mtraining.bench.train", __doc__, argv, "progress")
        if told["progress"]:
            work(options, Path(told["progress"]))
            return 0
        outcome = bench(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if outcome is None:
        return 0
    print(plain_table(*table(outcome.rows)))
    for note in (*outcome.failures, *outcome.notes):
        print(note)
    print(f"wrote {outcome.path}" if outcome.path else "no number to write")
    return 1 if outcome.failures else 0
