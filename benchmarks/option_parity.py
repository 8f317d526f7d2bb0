"""What an option of training changes: losses, seconds and memory of the same steps without it and with it.

    python benchmarks/option_parity.py --text moby-dick.txt --out CSV --set train.float8=rowwise        (a GPU, or more)
    python benchmarks/option_parity.py --text docs --out CSV --model small --set train.optimizer_state=8bit    (a CPU)

``smollm2`` is the run of `loss_parity.py`: pretrained SmolLM2-135M (`make smollm2`) under the settings of the
Qwen2.5-3B recipe. ``small`` is a model of 3 million random weights that reads bytes; it learns from nothing in a few
hundred steps. Model, text, seed and order of sequences of the two runs are the same. Ends with 1 if the mean losses of
the last tenth of the steps are further apart than allowed, relative to their size.

With ``--runs FOLDER`` a run that is complete is not made again. So the two can be made at once, each on its own GPU:

    CUDA_VISIBLE_DEVICES=0 python benchmarks/option_parity.py ... --ranks 1 --runs FOLDER --only without &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/option_parity.py ... --ranks 1 --runs FOLDER --only with & wait
    python benchmarks/option_parity.py ... --ranks 1 --runs FOLDER
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from loss_parity import MODEL, NATIVE, compared, configured, logged, prepare_text

from mtraining.bench.processes import gpus_in_use
from mtraining.bench.record import Provenance, appended, provenance
from mtraining.data import PrepareOptions, prepare
from mtraining.errors import RunStopped, UserError
from mtraining.sizes import size_text
from mtraining.train.config import Config

FIELDS = (
    "date commit gpu torch triton gpus ranks model seq_len option step loss_without loss_with relative "
    "seconds_without seconds_with memory_without memory_with"
).split()
SMALL = (
    "model={init: random, config: {model_type: qwen2, vocab_size: 260, hidden_size: 256, intermediate_size: 704, "
    "num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 2, tie_word_embeddings: true}}",
    "train.lr=1e-3",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "pattern={name: vertical_slash, block_size: 64, top_p: 0.95}",
    "layout={name: striped, unit: 64}",
)
_WARM_UP = 3  # steps that compile and allocate


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="a text file, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, help="CSV to add to, one row a step")
    parser.add_argument(
        "--set", action="append", required=True, help="the option of the second run; may be repeated"
    )
    parser.add_argument("--both", action="append", default=[], help="an option of both runs; may be repeated")
    parser.add_argument("--runs", type=Path, help="folder to keep the two runs in; default: they are removed")
    parser.add_argument(
        "--only", choices=("without", "with"), help="make this run alone, and compare nothing"
    )
    parser.add_argument("--model", choices=("smollm2", "small"), default="smollm2")
    parser.add_argument("--seq-len", type=int, help="default: 32768, of the small model 512")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, help="processes of both runs; default: one a GPU, one on a CPU")
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="of the mean loss of the last tenth of the steps"
    )
    options = parser.parse_args(argv)
    if options.only and options.runs is None:
        raise UserError(
            "--only makes one run for a later comparison; add --runs with the folder to keep it in."
        )
    return options


def kept(config: Config, prepare_data: Callable[[], object]) -> list[dict[str, Any]]:
    """What the steps of a run logged: of the one that is kept beside its folder, or of one made now.

    Args:
        prepare_data: called before a run is made.

    Raises:
        UserError: what is kept there had other settings.
    """
    folder, which = config.output.parent, config.output.name
    done = folder / f"{which}.json"
    settings = config.model_dump(mode="json", exclude={"output": True, "data": {"path"}})
    if done.exists():
        found = json.loads(done.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise UserError(f"--runs {folder} has a run {which} of other settings; give another folder.")
        return list(found["records"])
    shutil.rmtree(config.output, ignore_errors=True)  # of a run that was ended
    prepare_data()
    records = logged(config)
    done.write_text(json.dumps({"settings": settings, "records": records}), encoding="utf-8")
    return records


def make_data(model: str, text: Path, folder: Path) -> None:
    """Token shards of the text in FOLDER/data, for either model."""
    if model == "smollm2":
        prepare_text(text, folder)
        return
    options = PrepareOptions(sources=(str(text),), out=folder / "data", kind="text")
    print(prepare(options, progress=False).render(), flush=True)


def seconds(records: Sequence[dict[str, Any]]) -> float:
    """Of a step: the median, without the first ones where there are more."""
    return statistics.median(record["step_seconds"] for record in records[_WARM_UP:] or records)


def end_loss(records: Sequence[dict[str, Any]]) -> float:
    """The mean of the last tenth of the steps."""
    return statistics.mean(record["loss"] for record in records[-max(1, len(records) // 10) :])


def write(
    path: Path, told: Provenance, head: Sequence[Any], without: Sequence[Any], with_: Sequence[Any]
) -> None:
    rows = compared([record["loss"] for record in without], [record["loss"] for record in with_])
    with appended(path, FIELDS) as add:
        for (step, a, b, relative), one, other in zip(rows, without, with_, strict=True):
            measured = [f"{each[name]:.6g}" for name in ("step_seconds", "memory") for each in (one, other)]
            add([*astuple(told), *head, step, f"{a:.7g}", f"{b:.7g}", f"{relative:.3g}", *measured])


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    on_gpu = torch.cuda.is_available()
    ranks = options.ranks or (torch.cuda.device_count() if on_gpu else 1)
    small = options.model == "small"
    seq_len = options.seq_len or (512 if small else 4 * NATIVE)
    told = provenance(torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
    base = [*(SMALL if small else ()), *options.both]
    with tempfile.TemporaryDirectory(prefix="option-parity-") as name:
        folder = options.runs or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        # Once, and not at all where both runs are kept.
        prepared = cache(partial(make_data, options.model, options.text, Path(name)))

        def records(which: str) -> list[dict[str, Any]]:
            more = [*base, *(options.set if which == "with" else ())]
            data = Path(name) / "data"
            return kept(configured(folder / which, data, seq_len, options.steps, ranks, more), prepared)

        if options.only:
            records(options.only)
            return 0
        without, with_ = records("without"), records("with")
    head = [gpus_in_use(ranks), ranks, "small" if small else MODEL, seq_len, " ".join(options.set)]
    write(options.out, told, head, without, with_)
    ends = [end_loss(records) for records in (without, with_)]
    apart = abs(ends[1] / ends[0] - 1)
    times = [seconds(records) for records in (without, with_)]
    peaks = [max(record["memory"] for record in records) for records in (without, with_)]
    print(
        f"{len(with_)} steps of {seq_len} tokens with {' '.join(options.set)}: loss {without[0]['loss']:.4f} -> "
        f"{ends[0]:.4f} without, {ends[1]:.4f} with ({apart:.2%} apart, allowed {options.tolerance:.2%}); "
        f"{times[0]:.3f} s a step without, {times[1]:.3f} s with ({times[0] / times[1]:.2f}x); memory "
        f"{size_text(peaks[0])} without, {size_text(peaks[1])} with"
    )
    # A loss that is not a number is further apart than anything.
    return 0 if apart <= options.tolerance else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
