"""What each number of a run's telemetry costs a training step (docs/see.md).

python benchmarks/telemetry_cost.py [--layers 36] [--seq-len 32K] [--rounds 7] [--out FOLDER]
torchrun --nproc-per-node 2 benchmarks/telemetry_cost.py      # with the waits of a ring

One process a GPU, random weights, a prescribed index, estimation made and dropped, as `mtraining bench train` does.
Each round times all variants of a step, one after the other. Each is compared with the round's own step without
telemetry, so that a clock that drifts moves both. The median difference counts. "Noise" is half of what the middle half
of the differences spans: a cost below it was not seen. A step of the trainer's defaults pays for what is on in every
step, and once in `log.every` steps for the rest.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist

from mtraining.bench.processes import leave
from mtraining.bench.record import Provenance, provenance
from mtraining.bench.timing import wait
from mtraining.bench.train.cases import SHAPES, TrainCase, parse_tokens
from mtraining.bench.train.model import batches, build_model, parallel, process_for, random_sequences, stepper
from mtraining.kernel.measured_tiles import slug
from mtraining.model.indices import IndexMemory
from mtraining.ring import Timeline, prioritise_transfers
from mtraining.train import step as step_module
from mtraining.train.balance import attention_record, ring_record, write_balance
from mtraining.train.config import LogSection
from mtraining.train.loop import memory_shortages
from mtraining.train.mesh import Process, backend_for

COVERAGE = "coverage counted"
# What a logged step adds. Reports of coverage need what every step counts.
LOGGED = (
    "coverage reported",
    "index stability",
    "gradient norm by layer",
    "density and imbalance",
    "load of ranks (balance.json)",
    "memory shortages",
)
RING, RECALL = "waits of the ring", "recall (log.recall_rows=128)"
COLUMNS = (
    "date commit gpu gpus torch model layers seq_len density fused rounds item when step_ms added_ms noise_ms "
    "share_of_step"
).split()


class Blind(nullcontext[None]):
    """An observer that sees nothing."""

    stats: tuple[()] = ()

    def __init__(self, recall_rows: int) -> None:
        super().__init__()


@contextmanager
def only(items: set[str]) -> Iterator[None]:
    """Telemetry without what is not among the items."""
    nothing: dict[str, list[tuple[Any, str, Any]]] = {
        COVERAGE: [(IndexMemory, "count", lambda *_: None)],
        "coverage reported": [
            (IndexMemory, "uncovered", lambda *_: {}),
            (IndexMemory, "unread", lambda *_: {}),
        ],
        "index stability": [(IndexMemory, "moved", lambda *_: [])],
        "gradient norm by layer": [(step_module, "layer_gradient_norms", lambda layers: torch.zeros(0))],
    }
    with ExitStack() as patches:
        for item, replaced in nothing.items():
            if item not in items:
                for owner, name, value in replaced:
                    patches.enter_context(patch.object(owner, name, value))
        if not items & {"density and imbalance", "load of ranks (balance.json)", RECALL}:
            patches.enter_context(patch.object(step_module, "Observer", Blind))
        yield


class Steps:
    """Steps of one model, with whatever telemetry."""

    def __init__(self, case: TrainCase, process: Process, folder: Path) -> None:
        self.process = process
        model = parallel(case, build_model(case.shape, case.seq_len, case.layers, process.device), process)
        self.stepper = stepper(case, model, process)
        self.data = batches(case, random_sequences(case.shape.vocab, case.seq_len), process)
        outer = case.outer(process.world)
        self.config = SimpleNamespace(
            output=folder,
            parallel=SimpleNamespace(cp=process.world, cp_outer=outer),
            layout=SimpleNamespace(name=case.layout, unit=case.shape.block_size),
        )
        self.done = 0

    def seconds(self, items: Sequence[str]) -> float:
        """Of one step, from a common start to the end of the slowest rank's work, records included."""
        on, process = set(items), self.process
        logged = bool(on - {COVERAGE})
        timeline = Timeline() if RING in on else None
        with only(on):
            process.sum(torch.zeros(1, device=process.device))
            wait(process.device)
            start = time.perf_counter()
            with timeline or nullcontext():
                result = self.stepper.run(
                    self.data, self.done, observe=logged, recall_rows=128 if RECALL in on else 0
                )
            if timeline is not None:
                ring_record(timeline, process)
            if "memory shortages" in on:
                memory_shortages(process)
            attention_record(result.attention)
            if "load of ranks (balance.json)" in on and process.is_main:
                write_balance(cast(Any, self.config), self.done, result.attention)
            wait(process.device)
            self.done += 1
            return max(process.gather(time.perf_counter() - start))


def variants(world: int) -> dict[str, tuple[str, ...]]:
    """What is timed, by name: nothing, each item alone, and all that is on by default."""
    logged = (*LOGGED, *((RING,) if world > 1 else ()))
    alone = {item: (COVERAGE, item) if item == "coverage reported" else (item,) for item in logged}
    every: dict[str, tuple[str, ...]] = {"none": (), COVERAGE: (COVERAGE,)}
    return every | alone | {RECALL: (RECALL,), "a logged step, defaults": (COVERAGE, *logged)}


def measure(
    run: Callable[[Sequence[str]], float],
    world: int,
    rounds: int,
    after_round: Callable[[dict[str, list[float]]], None],
) -> dict[str, list[float]]:
    """Seconds of each variant in each round. What is known is given to ``after_round`` each time."""
    chosen = variants(world)
    taken: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(-1, rounds):  # the first round warms up
        for name, items in chosen.items():
            seconds = run(items)
            if number >= 0:
                taken[name].append(seconds)
        if number >= 0:
            after_round(taken)
    return taken


def costs(taken: dict[str, list[float]], every: int) -> list[dict[str, Any]]:
    """A row an item: milliseconds that it adds to a step, and its share of a step, logged once in ``every``."""
    base = statistics.median(taken["none"])

    def differences(name: str) -> list[float]:
        return [with_it - without for with_it, without in zip(taken[name], taken["none"], strict=True)]

    def added(name: str) -> float:
        return statistics.median(differences(name))

    def noise(of: Sequence[float]) -> float:
        if len(of) < 2:
            return 0.0
        low, _, high = statistics.quantiles(of, n=4, method="inclusive")
        return (high - low) / 2

    rows = [
        {
            "item": "none",
            "when": "",
            "step_ms": 1e3 * base,
            "added_ms": 0.0,
            "noise_ms": 0.0,
            "share_of_step": 0.0,
        }
    ]
    for name in list(taken)[1:]:
        when = "every step" if name == COVERAGE else f"1 of {every}"
        share = added(name) / base / (1 if name == COVERAGE else every)
        rows.append(
            {
                "item": name, "when": when, "step_ms": 1e3 * statistics.median(taken[name]),
                "added_ms": 1e3 * added(name), "noise_ms": 1e3 * noise(differences(name)), "share_of_step": share,
            }
        )  # fmt: skip
    means = [
        counted + (logged - counted) / every
        for counted, logged in zip(differences(COVERAGE), differences("a logged step, defaults"), strict=True)
    ]
    mean = statistics.median(means)
    rows.append(
        {
            "item": "defaults, mean of all steps", "when": "", "step_ms": 1e3 * (base + mean),
            "added_ms": 1e3 * mean, "noise_ms": 1e3 * noise(means), "share_of_step": mean / base,
        }
    )  # fmt: skip
    return rows


def write_costs(
    folder: Path, told: Provenance, case: TrainCase, world: int, rounds: int, rows: list[dict[str, Any]]
) -> Path:
    """The CSV of so many rounds, in place of that of fewer."""
    head = [told.date, told.commit, told.gpu, world, told.torch, case.shape.name, case.layers, case.seq_len]
    head += [case.density, case.fused, rounds]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"telemetry-cost-{slug(told.gpu)}-{told.date}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            numbers = [round(row[name], 6) for name in COLUMNS[-4:]]
            writer.writerow([*head, row["item"], row["when"], *numbers])
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-3b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="default: the model's own")
    parser.add_argument("--seq-len", type=parse_tokens, default=32768)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--fused", default="none")
    parser.add_argument("--rounds", type=int, default=7, help="of all variants, after one of warm-up")
    parser.add_argument("--every", type=int, default=LogSection().every, help="steps between logged ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of a CSV to write")
    return parser.parse_args()


def main() -> int:
    options = parse()
    device = torch.device(options.device, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        prioritise_transfers()
    else:
        device = torch.device("cpu")
    alone: dict[str, Any] = (
        {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    )
    dist.init_process_group(backend_for(device), **alone)
    rank, world, shape = dist.get_rank(), dist.get_world_size(), SHAPES[options.model]
    case = TrainCase(
        shape, options.seq_len, options.density, "striped", "flat", "keep_attention",
        options.layers or shape.layers, fused=options.fused,
    )  # fmt: skip
    say: Callable[[str], None] = (lambda text: print(text, flush=True)) if rank == 0 else (lambda text: None)
    say(f"{world} x {case.describe()}")
    told = provenance(device)

    def after_round(taken: dict[str, list[float]]) -> None:
        """A run that is ended early leaves the rounds it had."""
        seconds = taken["none"]
        say(f"round {len(seconds)} of {options.rounds}: {seconds[-1]:.3f} s a step without telemetry")
        if options.out is not None and rank == 0:
            path = write_costs(options.out, told, case, world, len(seconds), costs(taken, options.every))
            say(f"wrote {path}")

    with tempfile.TemporaryDirectory() as folder:
        steps = Steps(case, process_for(case, device, rank, world), Path(folder))
        rows = costs(measure(steps.seconds, world, options.rounds, after_round), options.every)
    for row in rows:
        say(
            f"{row['item']:32} {row['when']:10} {row['step_ms']:10.2f} ms {row['added_ms']:+9.2f} ms "
            f"(noise {row['noise_ms']:.2f}) {row['share_of_step']:+8.3%} of a step"
        )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    leave(main())
