"""Run folders with everything that a report shows, made without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from mtraining.train.balance import LANES

LAYERS, HEADS, RANKS = 4, 6, 4


def step_record(
    step: int,
    pattern: str,
    seed: int = 0,
    every: int = 2,
    size: tuple[int, int, int] = (LAYERS, HEADS, RANKS),
) -> dict[str, Any]:
    """A step's record, with all that a step on a ring logs."""
    layers, heads, ranks = size
    wave = math.sin(step * 1.7 + seed)
    dense = pattern == "dense"
    record: dict[str, Any] = {
        "step": step, "loss": 2.0 + 3.0 / step**0.5 + 0.05 * wave + (0.0 if dense else 0.02),
        "grad_norm": 1.0 + 0.2 * wave, "lr": 1e-4, "tokens_per_second": 1000.0 + 50 * wave + seed,
        "step_seconds": 2.0, "memory": 3 * 2**30,
    }  # fmt: skip
    if not dense and step % every == 0:
        record |= {
            "density": 0.2, "recall": 0.9, "worker_imbalance": 1.2, "step_imbalance": 1.4,
            "layer_density": [0.1 + 0.05 * (layer % 8) + 0.01 * wave for layer in range(layers)],
            "layer_recall": [0.95 - 0.03 * (layer % 8) + 0.001 * wave for layer in range(layers)],
            "recall_by_head": [
                [0.99 - 0.02 * (head % 8) - 0.03 * (layer % 8) for head in range(heads)] for layer in range(layers)
            ],
            "layer_stability": [0.5 + 0.05 * (layer % 8) + 0.01 * wave for layer in range(layers)],
            "layer_grad_norm": [1.0 + layer + wave for layer in range(layers)],
            "uncovered": 0.3, "uncovered_far": 0.5, "uncovered_run": 0.1, "uncovered_run_far": 0.2,
            "uncovered_by_distance": [0.0, 0.1, 0.4, 0.7 + 0.1 * wave],
            "uncovered_run_by_distance": [0.0, 0.0, 0.1, 0.3],
        }  # fmt: skip
    if step % every == 0:
        record |= {"ring_exposed_fraction": 0.1 + 0.02 * wave, "ring_exposed_fraction_max": 0.2}
        for phase in ("forward", "backward"):
            record |= {f"ring_{phase}_compute": [0.004] * ranks, f"ring_{phase}_exposed": [0.001] * ranks}
    return record


def evaluation(step: int, loss: float) -> dict[str, Any]:
    """An evaluation's record: two attentions, two lengths, needles."""
    held = [
        {
            "attention": attention, "length": length, "loss": loss + length / 10000, "bucket": length // 4,
            "by_position": [loss + 0.4, loss + 0.1, loss, loss - 0.1],
        }
        for attention in ("train", "dense")
        for length in (1024, 4096)
    ]  # fmt: skip
    suites = [
        {
            "suite": "needle",
            "attention": "train",
            "task": "needle_words",
            "length": 4096,
            "samples": 5,
            "score": 10.0 * step,
        }
    ]
    return {"step": step, "evaluation": "x", "held_out_loss": loss, "held_out": held, "suites": suites}


def make_run(
    folder: Path,
    pattern: str = "vertical_slash",
    steps: int = 10,
    planned: int = 10,
    seed: int = 0,
    every: int = 2,
    size: tuple[int, int, int] = (LAYERS, HEADS, RANKS),
    evaluations: int = 2,
) -> Path:
    """Write a run folder.

    Args:
        every: steps between those that log everything.
        size: layers, heads, and ranks of the ring.
        evaluations: after the one before the first step.
    """
    folder.mkdir(parents=True)
    ranks = size[2]
    records = [evaluation(0, 5.0)]
    for step in range(1, steps + 1):
        records.append(step_record(step, pattern, seed, every, size))
        if step % max(1, steps // evaluations) == 0:
            records.append(evaluation(step, 5.0 - step / steps))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {
        "output": str(folder),
        "pattern": {"name": pattern},
        "model": {"init": "models/Qwen2.5-3B"},
        "train": {"steps": planned, "seq_len": 65536, "batch_size": 4, "lr": 1e-4 * (1 + seed)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(options | {"parallel": {"cp": ranks}}))
    layouts = [
        {
            "layout": layout, "world": world, "worker": 1.5, "step": 1.2,
            "load": [[1.0 + rank + step for step in range(world)] for rank in range(world)],
        }
        for layout in ("contiguous", "zigzag", "striped")
        for world in (ranks, 8)
    ]  # fmt: skip
    (folder / "balance.json").write_text(json.dumps({"step": steps, "layouts": layouts}))
    lanes: dict[str, Any] = {"step": steps, "ranks": list(range(0, ranks, -(-ranks // LANES)))}
    for phase, seconds in (("forward", 0.001), ("backward", 0.002)):
        compute = [[seconds * (1 + rank)] * ranks for rank in lanes["ranks"]]
        lanes[phase] = {"compute": compute, "exposed": [[0.0005] * ranks for _ in compute]}
    (folder / "ring.json").write_text(json.dumps(lanes))
    about = {
        "environment": {"torch": "2.13", "device": "H100"}, "measured_on": "cuda",
        "memory_predicted": {"peak": 2.9 * 2**30, "components": {"weights": 2.9 * 2**30}},
        "start": {"seconds": {"imports": 6.0, "first step": 20.5}, "kernels_compiled": 23, "graphs_compiled": 0},
    }  # fmt: skip
    (folder / "about.json").write_text(json.dumps(about))
    return folder


def add_results(folder: Path) -> Path:
    """Write results of `mtraining evaluate` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"prompt_tokens": 1000, "removed": 0, "density": 0.2, "recall": None}
    lines = [
        {
            "model": "small", "attention": "train", "suite": "needle", "task": "needle_words", "length": length,
            "number": number, "score": float(depth < 0.5), "details": {"depth": depth}, **common,
        }
        for length in (1024, 4096)
        for number, depth in enumerate((0.0, 0.5, 1.0))
    ]  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
