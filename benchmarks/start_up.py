"""What a start costs: `mtraining train` from the command to the end of its first step, part by part.

    python benchmarks/start_up.py --out CSV                     (NVIDIA GPUs; Qwen2.5-3B's shape, 512K tokens)
    python benchmarks/start_up.py --out CSV --shape tiny --seq-len 512 --device cpu --processes 1 2        (on a CPU)

Each number of processes starts twice, with caches of kernels of its own: empty (``cold``), and as the first start left
them (``warm``), as after a restart. Weights are random, and saved beforehand, so that a start reads them as it would
read a pretrained model. Python's own files are read once before.

Seconds of parts are those of the main rank, from about.json. ``command_seconds`` is the whole command with its second
step, checkpoint and end; ``cpu_seconds`` what all of its processes computed, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import yaml

from mtraining.bench.record import appended, provenance
from mtraining.bench.train.cases import SHAPES, Shape, parse_tokens
from mtraining.data import PrepareOptions, prepare
from mtraining.train.about import ABOUT

PARTS = (
    "imports", "checks", "process groups", "model", "data", "optimizer", "checkpoint", "trackers and predictions",
    "first step",
)  # fmt: skip
BYTES = 260  # words of a tokenizer of bytes, and of its marks
COUNTS = "kernels_compiled kernels_from_cache kernel_seconds graphs_compiled graphs_from_cache graph_seconds".split()
FIELDS = (
    "date commit gpu torch triton model layers seq_len fused pattern processes caches command_seconds cpu_seconds "
    "start_seconds".split()
    + [part.replace(" ", "_") for part in PARTS]
    + COUNTS
)


def write_data(folder: Path, seq_len: int) -> Path:
    """Two sequences of text, by bytes."""
    folder.mkdir(parents=True)
    numbers = " ".join(map(str, range(seq_len)))
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text(numbers[: seq_len + 1], encoding="utf-8")
    prepare(PrepareOptions(sources=(str(folder),), out=folder / "shards", kind="text"), progress=False)
    return folder / "shards"


def write_model(folder: Path, shape: Shape, seq_len: int, layers: int) -> Path:
    """Random weights in bf16, as a Hugging Face folder."""
    from mtraining.bench.train.model import build_model
    from mtraining.train.display import quiet_libraries

    quiet_libraries()
    words = max(shape.vocab, BYTES)
    model = build_model(shape, seq_len, layers, torch.device("cpu"), vocab_size=words)
    model.bfloat16().save_pretrained(folder)
    return folder


def recipe(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The run, but for its folder and its processes."""
    shape = SHAPES[options.shape]
    return {
        "model": {"init": str(work / "model")},
        "data": {"path": str(work / "data" / "shards"), "mode": "documents"},
        "pattern": {"name": options.pattern, "block_size": shape.block_size},
        "layout": {"name": "striped", "unit": shape.block_size},
        "train": {
            "seq_len": options.seq_len,
            "steps": 2,
            "dtype": "bf16" if options.device == "cuda" else "fp32",
            "recompute": "keep_attention",
            "fused": options.fused,
        },
        "checkpoint": {"every": 0, "export": False},
        "distributed": {"device": options.device},
    }


def start(
    raw: dict[str, Any], work: Path, processes: int, caches: Path
) -> tuple[dict[str, Any], float, float]:
    """One command: what about.json says of its start, its seconds, and those of all its processors."""
    run = Path(tempfile.mkdtemp(dir=work)) / "run"
    path = run.with_name("recipe.yaml")
    path.write_text(
        yaml.safe_dump(raw | {"output": str(run), "parallel": {"cp": processes}}), encoding="utf-8"
    )
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
    }
    command = [sys.executable, "-m", "mtraining.cli", "train", str(path), f"--nproc={processes}"]
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads((run / ABOUT).read_text(encoding="utf-8"))["start"], seconds, computed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, required=True, help="CSV to add to")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-3b")
    parser.add_argument("--layers", type=int, help="default: the shape's own")
    parser.add_argument("--seq-len", type=parse_tokens, default=parse_tokens("512K"))
    parser.add_argument("--pattern", default="vertical_slash")
    parser.add_argument("--fused", default="none")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[torch.cuda.device_count() if cuda else 1]
    )
    parser.add_argument("--warm", type=int, default=1, help="starts with caches that a start has filled")
    options = parser.parse_args(argv)
    layers = SHAPES[options.shape].layers if options.layers is None else options.layers
    told = provenance(torch.device(options.device))
    with tempfile.TemporaryDirectory(prefix="start-up-") as folder, appended(options.out, FIELDS) as write:
        work = Path(folder)
        write_data(work / "data", options.seq_len)
        write_model(work / "model", SHAPES[options.shape], options.seq_len, layers)
        raw = recipe(options, work)
        subprocess.run([sys.executable, "-c", "import mtraining.train.loop"], check=True)
        for processes in options.processes:
            for number in range(1 + options.warm):
                found, seconds, computed = start(raw, work, processes, work / f"caches-{processes}")
                parts = [found["seconds"].get(part, 0.0) for part in PARTS]
                total, caches = sum(found["seconds"].values()), "warm" if number else "cold"
                write(
                    [
                        *astuple(told), options.shape, layers, options.seq_len, options.fused, options.pattern,
                        processes, caches, f"{seconds:.2f}", f"{computed:.2f}", f"{total:.2f}",
                        *(f"{part:.2f}" for part in parts), *(found[name] for name in COUNTS),
                    ]
                )  # fmt: skip
                shown = ", ".join(f"{name} {part:.1f}" for name, part in zip(PARTS, parts, strict=True))
                print(
                    f"{processes} processes, {caches}: {total:.1f} s to the first step's end ({shown}), command "
                    f"{seconds:.1f} s, processors {computed:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
