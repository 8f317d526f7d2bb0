"""`mtraining bench train`: whole training steps, sparse beside dense, on the GPUs there are.

The timed step is the trainer's own (model, ring, FSDP2, optimizer), under random weights and a prescribed index, with
the index estimate of a real run made and dropped. Nothing is timed before its loss and gradients have been found right.

``python -m mtraining.bench.train`` needs torch and transformers only, where the command line's packages are missing.
Both start a process for each GPU, or are one of the processes that torchrun started.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtraining.bench.processes import take_device
from mtraining.bench.record import COMMIT_VARIABLE, code_version, provenance, write_csv
from mtraining.bench.train.cases import PRESETS, SHAPES, Group, TrainCase, parse_tokens
from mtraining.bench.train.progress import Effort, Progress
from mtraining.bench.train.record import TrainRow, draw, table
from mtraining.errors import UserError
from mtraining.train.mesh import backend_for

CSV_FOLDER = Path("benchmarks/results")
_STUCK = timedelta(
    minutes=10
)  # a rank whose peer is gone gives up after this, and the launcher starts all again
Say = Callable[[str], None]


@dataclass(frozen=True)
class Choice:
    """What to measure. None and empty stand for the preset's; no preset and no device for what suits the machine.

    seq_len, density, layout, ring, recompute: every length and policy is measured; of the others the first value is
    the base, and each further one varies alone. dense: also the dense step (zigzag, flat), which sparse ones are
    compared with. warmup, steps, seconds: see `Effort`. chart: an SVG of the result.
    """

    preset: str = ""
    model: str = ""
    seq_len: Sequence[str] = ()
    density: Sequence[float] = ()
    layout: Sequence[str] = ()
    ring: Sequence[str] = ()
    recompute: Sequence[str] = ()
    layers: int | None = None
    dense: bool | None = None
    kernel: str = ""
    dense_kernel: str = ""
    fused: str = ""
    offload: bool | None = None
    warmup: int = 1
    steps: int = 5
    seconds: float = 60.0
    device: str = ""
    nproc: int | None = None
    out: str = str(CSV_FOLDER)
    chart: str = ""

    @property
    def on_gpu(self) -> bool:
        return (self.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"

    @property
    def processes(self) -> int:
        """One a GPU; two on a CPU."""
        return self.nproc or (torch.cuda.device_count() if self.on_gpu else 2)

    def cases(self) -> list[TrainCase]:
        """The preset's cases with the given options in place of its own, each case once.

        Raises:
            UserError: a value that is not known.
        """
        name = self.preset or ("table" if self.on_gpu else "tiny")
        if name not in PRESETS:
            raise UserError(f"preset: {name!r} is not known; choose one of {', '.join(PRESETS)}.")
        model, groups = PRESETS[name]
        model = self.model or model
        if model not in SHAPES:
            raise UserError(f"model: {model!r} is not known; choose one of {', '.join(SHAPES)}.")
        given = {field.name: getattr(self, field.name) for field in fields(Group)}
        given["seq_len"] = [parse_tokens(text) for text in self.seq_len]
        given = {key: value for key, value in given.items() if value not in (None, "", (), [])}
        if self.seq_len:  # lengths of the user's own: one group, not one for each of the preset's
            groups = groups[:1]
        cases = (case for group in groups for case in replace(group, **given).cases(SHAPES[model]))
        return list(dict.fromkeys(cases))

    def check(self) -> None:
        """What can be refused before any process starts.

        Raises:
            UserError: naming the option.
        """
        if self.device not in ("", "cuda", "cpu"):
            raise UserError(f"device: {self.device!r} is not known; use cuda or cpu.")
        gpus = torch.cuda.device_count()
        if self.on_gpu and not 1 <= self.processes <= gpus:
            raise UserError(
                f"nproc: {self.processes} processes want a GPU each and there are {gpus}; use device cpu."
            )
        if self.steps < 1 or self.warmup < 1:
            raise UserError(f"steps={self.steps}, warmup={self.warmup}: both must be at least 1.")
        if self.fused == "liger" and not self.on_gpu:
            raise UserError("fused: liger needs an NVIDIA GPU; use none or compile.")
        self.cases()


@dataclass(frozen=True)
class Outcome:
    """Rows that may be believed, what was wrong, what could not run, and the file of the rows (None without any)."""

    rows: list[TrainRow]
    failures: list[str]
    notes: list[str]
    path: Path | None


def bench(choice: Choice, say: Say = print) -> Outcome | None:
    """Measure, adding to the CSV case by case. Under torchrun this is one of its processes, and only the first of them
    gets the outcome; otherwise processes are started here.

    Raises:
        UserError: bad options.
    """
    choice.check()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # its agent, our parent, outlives the processes it starts again
        path = Path(tempfile.gettempdir()) / f"mtraining-bench-train-{os.getppid()}.jsonl"
        return _outcome(choice, path) if work(choice, path, say) == 0 else None
    with tempfile.TemporaryDirectory(prefix="mtraining-bench-") as folder:
        path = Path(folder) / "progress.jsonl"
        _start(choice, path)
        return _outcome(choice, path)


def _start(choice: Choice, path: Path) -> None:
    """The processes, by torchrun: when one leaves in the middle of a case all are started again, and go on after it."""
    launcher = [
        "torch.distributed.run", "--standalone", f"--nproc-per-node={choice.processes}",
        f"--max-restarts={len(choice.cases())}", "--monitor-interval=0.2",
    ]  # fmt: skip
    worker = [
        "-m",
        "mtraining.bench.train",
        f"--progress={path}",
        f"--choice={json.dumps(asdict(choice))}",
    ]
    environment = os.environ | {COMMIT_VARIABLE: code_version()}
    if not choice.on_gpu:
        environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run([sys.executable, "-m", *launcher, *worker], env=environment, check=False)
    if done.returncode and not path.exists():
        raise UserError(f"nproc: {choice.processes} processes could not be started; what they said is above.")


def _outcome(choice: Choice, path: Path) -> Outcome:
    found = Progress(path)
    missing = len(choice.cases()) - len(found.ended)
    notes = found.notes + [f"{missing} cases were not reached"] * bool(missing)
    if choice.chart and found.rows:
        draw(found.rows, Path(choice.chart))
    return Outcome(found.rows, found.failures, notes, found.path_of_rows)


def work(choice: Choice, path: Path, say: Say = print) -> int:
    """One process's part; returns its rank. Collective over the processes that torchrun started."""
    # With transformers, which the launching process can do without.
    from mtraining.bench.train.worker import run_cases
    from mtraining.model import use_expandable_segments

    allocator = use_expandable_segments() if choice.on_gpu else ""
    rank, device = int(os.environ["RANK"]), take_device(choice.on_gpu)
    dist.init_process_group(backend_for(device), timeout=_STUCK)
    if rank == 0 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        path.unlink(missing_ok=True)  # another run's, where torchrun's agent had the same number
        if allocator:
            say(allocator)
    box = [Progress(path)]
    dist.broadcast_object_list(box)
    progress = box[
        0
    ]  # the first rank's: what it goes on to write is no news, and other nodes have no such file

    def keep(row: TrainRow) -> None:
        progress.tell(path=str(write_csv([row], Path(choice.out), "train")))

    effort = Effort(choice.warmup, choice.steps, choice.seconds)
    try:
        run_cases(choice.cases(), effort, device, provenance(device), progress, keep, say)
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the others may wait inside a collective, and an orderly end would wait for them
    dist.destroy_process_group()
    return rank


def main(argv: Sequence[str] | None = None) -> int:
    """The command without the command line's packages: a plain table; 1 where a step was wrong, 2 for bad input."""
    args = vars(_parser().parse_args(argv))
    progress, given = args.pop("progress"), args.pop("choice")
    try:
        if progress:
            work(Choice(**json.loads(given)), Path(progress))
            return 0
        outcome = bench(Choice(**args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if outcome is None:
        return 0
    heads, cells = table(outcome.rows)
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for line in (heads, *cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    for note in (*outcome.failures, *outcome.notes):
        print(note)
    print(f"wrote {outcome.path}" if outcome.path else "no number to write")
    return 1 if outcome.failures else 0


def _parser() -> argparse.ArgumentParser:
    """An option for each field of `Choice`."""
    parser = argparse.ArgumentParser(prog="python -m mtraining.bench.train", description=__doc__)
    for field in fields(Choice):
        options: dict[str, Any] = {"default": field.default, "help": HELP[field.name]}
        if field.name in ("dense", "offload"):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(field.default, tuple):
            options |= {"action": "append", "type": float if field.name == "density" else str, "default": []}
        else:
            options["type"] = TYPES.get(field.name, str)
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    for internal in ("progress", "choice"):  # what the launcher tells the processes that it starts
        parser.add_argument(f"--{internal}", default="", help=argparse.SUPPRESS)
    return parser


TYPES = {"layers": int, "warmup": int, "steps": int, "nproc": int, "seconds": float}
HELP = {
    "preset": f"one of {', '.join(PRESETS)}; default: table, on a CPU tiny",
    "model": f"shape of the model: {', '.join(SHAPES)}",
    "seq_len": "tokens a sequence, such as 512K; may be repeated, as the next four",
    "density": "computed share of attention, such as 0.05",
    "layout": "striped, zigzag or contiguous",
    "ring": "flat, or OUTERxINNER such as 2x2",
    "recompute": "full, keep_attention or none",
    "layers": "decoder layers, of both sides; default: the model's own",
    "dense": "time the dense step too",
    "kernel": "attention backend of sparse steps",
    "dense_kernel": "attention backend of dense steps",
    "fused": "what surrounds attention: none, compile or liger",
    "offload": "keep activations in host memory",
    "warmup": "steps before the timed ones",
    "steps": "timed steps at most; the median counts",
    "seconds": "time fewer steps, at least one, where they would take longer than this",
    "device": "cuda or cpu; default: cuda where there is one",
    "nproc": "processes; default: one a GPU, two on a CPU",
    "out": "folder of the CSV",
    "chart": "draw the result into this SVG file",
}
