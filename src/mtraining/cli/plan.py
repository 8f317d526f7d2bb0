"""`mtraining plan`: what a run will take on a cluster, before renting it. Needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtraining.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from mtraining.predict.measured import Rates
    from mtraining.predict.plan import Outcome, Plan, Planner


def plan(
    model: Annotated[
        str, typer.Option(help="A run's YAML file, a model folder or hub id, or a shape such as qwen2.5-3b.")
    ],
    seq_len: Annotated[str, typer.Option(help="Tokens of a sequence, such as 512K.")],
    gpus: Annotated[str, typer.Option(help="4x8 for four nodes of eight GPUs, 8 for one node.")],
    gpu: Annotated[
        str, typer.Option(help="h100 or h200, or a GPU that `mtraining bench rates` measured.")
    ] = "h200",
    rates: Annotated[
        Path | None, typer.Option(help="Rates measured on your own GPU by `mtraining bench rates`.")
    ] = None,
    intra: Annotated[
        str | None, typer.Option(help="A GPU's link inside its node: 300GB/s, or 300GB/s,20us.")
    ] = None,
    inter: Annotated[str | None, typer.Option(help="A GPU's link to other nodes, such as 25GB/s.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens to train on in all, such as 1B.")] = "1B",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a step at most; default: as many as is fastest.")
    ] = None,
    density: Annotated[
        float, typer.Option(help="Share of causal attention that the pattern computes.")
    ] = 0.05,
    columns: Annotated[int, typer.Option(min=0, help="Tokens of each head that all later ones read.")] = 2048,
    fused: Annotated[str, typer.Option(help="As train.fused: none, liger or compile.")] = "liger",
    run: Annotated[
        Path | None, typer.Option(help="A run folder whose measured balance is simulated instead.")
    ] = None,
    slowest: Annotated[
        float, typer.Option(min=1.0, help="How many times slower one GPU of each sequence is.")
    ] = 1.0,
    picture: Annotated[
        Path | None, typer.Option(help="Write one layer's timeline into this SVG file.")
    ] = None,
) -> None:
    """Plan a run on a cluster: seconds a step, memory, GPU-hours, and the best of the ways to spread it.

    Times come from rates that were measured, never from a data sheet. A GPU without rates is refused."""
    from rich.console import Console

    from mtraining.bench.train.cases import parse_tokens
    from mtraining.predict.measured import Link, rates_of, read_rates
    from mtraining.predict.plan import Cluster, Job, Planner, prescribed_pattern
    from mtraining.predict.saved import saved_works
    from mtraining.predict.work import Index

    budget = parse_budget(tokens)
    length = parse_tokens(seq_len)
    measured = read_rates(rates) if rates else rates_of(gpu)
    cluster = Cluster.of(
        gpus,
        measured,
        Link.parse(intra, "--intra") if intra else None,
        Link.parse(inter, "--inter") if inter else None,
    )
    hf_model = _model(model, length)
    pattern = prescribed_pattern(density, columns, length)
    index = Index.prescribed(pattern, length, hf_model.config.num_attention_heads)
    works = saved_works(run, hf_model, length, columns) if run else {}
    planner = Planner(Job(hf_model, index, pattern, fused, works, slowest, batch), cluster)
    found = planner.plan()
    _show(Console(), planner, found, budget, f"{run}" if run else f"{density:.1%}")
    if picture is not None:
        from mtraining.report.layer_timeline import write_timeline

        write_timeline(found.best.time, picture)
        typer.echo(f"wrote {picture}")


def parse_budget(text: str) -> float:
    """1B -> 1e9: K, M, B and T are powers of a thousand, as token budgets are told.

    Raises:
        UserError: not a number of tokens.
    """
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    digits, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1.0)
    try:
        number = float(digits) * unit
    except ValueError:
        number = 0.0
    if not 0 < number < 1e18:
        raise UserError(f"--tokens: {text!r} is no number of tokens; use for example 1B or 500M.")
    return number


def _amount(budget: float) -> str:
    """As :func:`parse_budget` takes it: 1e9 is 1B."""
    size, unit = next((one for one in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if budget >= one[0]), (1.0, ""))
    return f"{budget / size:.6g}{unit}"


def _model(name: str, seq_len: int) -> Any:
    """Its shapes, on the meta device. Rotary positions are left out: neither time nor memory depends on them."""
    import torch

    from mtraining.bench.train.cases import SHAPES
    from mtraining.bench.train.model import build_model as build_shape
    from mtraining.model import ModelOptions, build_model

    if name in SHAPES:
        return build_shape(SHAPES[name], seq_len, SHAPES[name].layers, torch.device("meta"))
    options = ModelOptions(init=name)
    if name.endswith((".yaml", ".yml")):
        from mtraining.train.config import load_config

        options = load_config(Path(name), []).model
        options = options.model_copy(update={"rope": type(options.rope)()})
    return build_model(options, seq_len if options.init == "random" else 1, device="meta")[0]


def _show(console: Console, planner: Planner, found: Plan, budget: float, pattern: str) -> None:
    from rich.table import Table

    from mtraining.predict.memory import GIB
    from mtraining.predict.recompute import policies_text
    from mtraining.sizes import size_text, tokens_text

    best, rates, cluster = found.best, planner.cluster.rates, planner.cluster

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    say(
        f"{cluster.nodes} x {cluster.node_size} {rates.gpu}, {tokens_text(planner.job.seq_len)} tokens a sequence, "
        f"{planner.shape.layers} layers, {planner.shape.total / 1e9:.2f}B parameters, attention {pattern}"
    )
    say(f"best: {_words(best)}")
    if best.setting.policies is not None:
        say(f"train.recompute=auto: {policies_text(best.setting.policies)}")
    shown = Table("", "sparse", "dense")
    for row in _rows(best, found.dense, budget, cluster.world):
        shown.add_row(*row)
    shown.add_row("memory of a GPU", size_text(found.memory.needed), f"of {rates.memory_gib:.0f} GiB")
    if found.memory.wanted > rates.memory_gib * GIB:
        shown.add_row("to never run short", size_text(found.memory.wanted), "")
    console.print(shown)
    parts = Table("a sparse step", "seconds", "share")
    for name, seconds in sorted(best.time.parts.items(), key=lambda part: -part[1]):
        parts.add_row(name, f"{seconds:.3g}", f"{seconds / best.time.seconds:.1%}")
    console.print(parts)
    others = Table("instead of the best", "", "seconds a step", "tokens/s lost", "why")
    others.columns[0].no_wrap = others.columns[1].no_wrap = True
    for one in found.alternatives:
        time = "" if one.outcome is None else f"{one.outcome.time.seconds:.4g}"
        loss = "" if one.loss is None else f"{one.loss:+.1%}"
        others.add_row(one.choice, one.value, time, loss, one.why)
    console.print(others)
    for note in _notes(rates, cluster.nodes):
        say(note)


def _words(way: Outcome) -> str:
    at = way.setting
    ring = f"{at.outer} x {at.cp // at.outer} ranks" if at.outer > 1 else f"a flat ring of {at.cp}"
    offload = ", train.offload: true" if at.offload else ""
    return (
        f"parallel: {{dp: {at.dp}, cp: {at.cp}, cp_outer: {at.outer}}} ({ring}), layout: {at.layout.name}, "
        f"train.recompute: {at.recompute}{offload}, train.fused: {at.fused}"
    )


def _rows(best: Outcome, dense: Outcome, budget: float, world: int) -> list[tuple[str, str, str]]:
    both = (best, dense)
    hours = [budget / way.tokens_per_second / 3600 for way in both]
    lines = {
        "seconds a step": [f"{way.time.seconds:.4g}" for way in both],
        "tokens a step": [f"{way.setting.dp * way.seq_len:,}" for way in both],
        "tokens/s": [f"{way.tokens_per_second:,.0f}" for way in both],
        "tokens/s of a GPU": [f"{way.tokens_per_second / world:,.0f}" for way in both],
        f"hours for {_amount(budget)} tokens": [f"{each:,.1f}" for each in hours],
        f"GPU-hours for {_amount(budget)} tokens": [f"{each * world:,.0f}" for each in hours],
        "ring waits, forward": [f"{way.time.forward.exposed_fraction:.1%}" for way in both],
        "ring waits, backward": [f"{way.time.backward.exposed_fraction:.1%}" for way in both],
        "sparse over dense": [f"{best.tokens_per_second / dense.tokens_per_second:.2f}x", ""],
    }
    return [(name, *cells) for name, cells in lines.items()]  # type: ignore[misc]


def _notes(rates: Rates, nodes: int) -> list[str]:
    """What the reader should know of where the numbers come from."""
    notes = [f"rates: {name}: {source}" for name, source in rates.sources.items()]
    notes.append(
        "Not counted: launching, a transfer taking multiprocessors from a kernel, loading data, checkpoints."
    )
    if nodes > 1 and rates.inter is None:
        notes.append(
            "No link between nodes was measured here: --inter is taken at its word, for each GPU, in each direction."
        )
    return notes
